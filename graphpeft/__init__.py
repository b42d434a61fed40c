"""graphpeft: parameter-efficient fine-tuning of any PyTorch model, as rewrites of torch.fx graphs."""

from importlib.metadata import version
from typing import Any

from graphpeft import methods
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
from graphpeft.exporting import ExportError, ExportReport, export, export_adapter, generation_inputs
from graphpeft.graph import ops
from graphpeft.graph.errors import GuardError, NeedsInputsError, TraceError
from graphpeft.graph.own_tensors import own_weight
from graphpeft.graph.recorded import recorded
from graphpeft.graph.template import names_in_slots
from graphpeft.learning import LearningReport, SiteLearning, TensorLearning, check_learning
from graphpeft.methods import *
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.model.base_state_dicts import get_base_model_state_dict, set_base_model_state_dict
from graphpeft.model.injecting import inject_adapter_in_model
from graphpeft.model.kbit_training import cast_mixed_precision_params, prepare_model_for_kbit_training
from graphpeft.model.merging_files import merge_checkpoint
from graphpeft.model.other_stacks import AdapterTensors, adapter_tensors, check_serving, save_adapter
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
from graphpeft.model.trainers import update_and_allocate_callback
from graphpeft.model.training_methods import penalty_of
from graphpeft.model.tuners import PEFT_TYPE_TO_TUNER_MAPPING
from graphpeft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from graphpeft.passes.optimization import PassReport, optimize
from graphpeft.peft_errors import PeftError, PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.delta_rule import DeltaRule, ProductRule, WeightRule
from graphpeft.rules.given_config import check_if_peft_model, get_peft_config
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.products import Diagonal, Factor, Product, Transposed
from graphpeft.rules.registry import PEFT_TYPE_TO_CONFIG_MAPPING, register
from graphpeft.rules.report import Report
from graphpeft.rules.rule import (
    BoundaryRule,
    InputRule,
    Mergeable,
    OperationRule,
    Rule,
    RunsByRow,
)
from graphpeft.rules.trained import FullyTrainedModule, SiteParameters, TableRows
from graphpeft.showing import Shown, show
from graphpeft.sites.feeding import feeding
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.targeting.condition_numbers import KappaTuneSelector, find_kappa_target_modules
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.tracing.trace import trace

__version__ = version("graphpeft")

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaptError",
    "AdapterTensors",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BoundaryRule",
    "CallSite",
    "CheckpointError",
    "DeltaRule",
    "Diagonal",
    "ExportError",
    "ExportReport",
    "Factor",
    "FileForm",
    "FullyTrainedModule",
    "GuardError",
    "InputRule",
    "KappaTuneSelector",
    "LeafSite",
    "LearningReport",
    "Mergeable",
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
    "Product",
    "ProductRule",
    "RankAxis",
    "Report",
    "Rule",
    "RunsByRow",
    "Shown",
    "Site",
    "SiteLearning",
    "SiteParameters",
    "TableRows",
    "TargetedConfig",
    "TaskType",
    "TensorLearning",
    "TraceError",
    "Transposed",
    "TunerLayerStatus",
    "TunerModelStatus",
    "WeightRule",
    "adapter_tensors",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "check_learning",
    "check_serving",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "explain",
    "export",
    "export_adapter",
    "feeding",
    "find_kappa_target_modules",
    "generation_inputs",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_checkpoint",
    "names_in_slots",
    "ops",
    "optimize",
    "own_weight",
    "penalty_of",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "recorded",
    "register",
    "save_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "show",
    "trace",
    "update_and_allocate_callback",
]
__all__ += methods.__all__


def __getattr__(name: str) -> Any:
    raise AttributeError(absence(name), name=name)
