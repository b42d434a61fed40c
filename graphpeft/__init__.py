"""graphpeft: parameter-efficient fine-tuning of any PyTorch model, as rewrites of torch.fx graphs."""

from graphpeft.adapters.checkpoint import CheckpointError
from graphpeft.adapters.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from graphpeft.adapters.plan import AdaptError
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
from graphpeft.methods.cpt import CPTConfig
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
)
from graphpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from graphpeft.methods.prefix_tuning import PrefixTuningConfig
from graphpeft.methods.prompt_encoder import PromptEncoderConfig
from graphpeft.methods.prompt_tuning import PromptTuningConfig
from graphpeft.methods.prompts.token_sequences import TokenSequence, find_token_sequence
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.model.peft_model import PeftModel
from graphpeft.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from graphpeft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from graphpeft.passes.optimization import PassReport, optimize
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.delta_rule import DeltaRule, WeightRule
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.registry import register
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
    "InputRule",
    "LeafSite",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraPerCallConfig",
    "Mergeable",
    "MultitaskPromptTuningConfig",
    "NeedsInputsError",
    "OperationRule",
    "ParameterSpec",
    "PassReport",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
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
    "WeightRule",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "explain",
    "export",
    "export_adapter",
    "feeding",
    "find_token_sequence",
    "get_eva_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "names_in_slots",
    "ops",
    "optimize",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "recorded",
    "register",
    "set_peft_model_state_dict",
    "trace",
]
