"""graphpeft: parameter-efficient fine-tuning of any PyTorch model, as rewrites of torch.fx graphs."""

from typing import Any

from graphpeft.absent_names import absence
from graphpeft.adapters.checkpoint import CheckpointError
from graphpeft.adapters.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from graphpeft.adapters.plan import AdaptError, NoMatchingPeftModuleError
from graphpeft.adapters.swappable import prepare_model_for_compiled_hotswap
from graphpeft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from graphpeft.exporting import ExportError, ExportReport, export, export_adapter
from graphpeft.graph import ops
from graphpeft.graph.errors import GuardError, NeedsInputsError, TraceError
from graphpeft.graph.recorded import recorded
from graphpeft.graph.template import names_in_slots
from graphpeft.methods.adalora import AdaLoraConfig
from graphpeft.methods.cpt import CPTConfig
from graphpeft.methods.ia3 import IA3Config
from graphpeft.methods.ln_tuning import LNTuningConfig
from graphpeft.methods.loha import LoHaConfig
from graphpeft.methods.lokr import LoKrConfig
from graphpeft.methods.lora import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraPerCallConfig,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from graphpeft.methods.lora.conversion import convert_to_lora, save_as_lora
from graphpeft.methods.lora.rescaling import rescale_adapter_scale
from graphpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from graphpeft.methods.prefix_tuning import PrefixTuningConfig
from graphpeft.methods.prompt_encoder import PromptEncoderConfig, PromptEncoderReparameterizationType
from graphpeft.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.methods.prompts.token_sequences import TokenSequence, find_token_sequence
from graphpeft.methods.trainable_tokens import TrainableTokensConfig
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.model.base_state_dicts import get_base_model_state_dict, set_base_model_state_dict
from graphpeft.model.injecting import inject_adapter_in_model
from graphpeft.model.kbit_training import cast_mixed_precision_params, prepare_model_for_kbit_training
from graphpeft.model.peft_model import PeftMixedModel, PeftModel
from graphpeft.model.state_dicts import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from graphpeft.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from graphpeft.model.task_models import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from graphpeft.model.trainer_callback import update_and_allocate_callback
from graphpeft.model.training_methods import penalty_of
from graphpeft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from graphpeft.passes.optimization import PassReport, optimize
from graphpeft.peft_errors import PeftError, PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.delta_rule import DeltaRule, WeightRule
from graphpeft.rules.given_config import check_if_peft_model, get_peft_config
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.registry import PEFT_TYPE_TO_CONFIG_MAPPING, register
from graphpeft.rules.report import Report
from graphpeft.rules.rule import (
    BoundaryRule,
    Combines,
    InputRule,
    Mergeable,
    OperationRule,
    ReplacesWeight,
    Rule,
    RunsByRow,
)
from graphpeft.rules.trained import FullyTrainedModule, SiteParameters, TableRows
from graphpeft.sites.feeding import feeding
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.tracing.trace import trace

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaLoraConfig",
    "AdaptError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BoundaryRule",
    "CPTConfig",
    "CallSite",
    "CheckpointError",
    "Combines",
    "CordaConfig",
    "DeltaRule",
    "EvaConfig",
    "ExportError",
    "ExportReport",
    "FileForm",
    "FullyTrainedModule",
    "GuardError",
    "IA3Config",
    "InputRule",
    "LNTuningConfig",
    "LeafSite",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraPerCallConfig",
    "Mergeable",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NeedsInputsError",
    "NoMatchingPeftModuleError",
    "OperationRule",
    "ParameterSpec",
    "PassReport",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RankAxis",
    "ReplacesWeight",
    "Report",
    "Rule",
    "RunsByRow",
    "Site",
    "SiteParameters",
    "TableRows",
    "TargetedConfig",
    "TaskType",
    "TokenSequence",
    "TraceError",
    "TrainableTokensConfig",
    "TunerLayerStatus",
    "TunerModelStatus",
    "WeightRule",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "explain",
    "export",
    "export_adapter",
    "feeding",
    "find_token_sequence",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "names_in_slots",
    "ops",
    "optimize",
    "penalty_of",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "recorded",
    "register",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "trace",
    "update_and_allocate_callback",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(absence(name), name=name)
