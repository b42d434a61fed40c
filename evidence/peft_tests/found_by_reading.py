"""What was found by reading tests that fail with graphpeft: patterns of failures, and what each is about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

WRONG = "shows a mistake of graphpeft's"
OPEN = "wants what graphpeft doesn't do, and could"
NAMES = "uses a name that graphpeft doesn't have"
OTHERWISE = "wants what graphpeft does otherwise on purpose"
BETTER = "wants an error or a limit where graphpeft works"
WORDING = "compares the wording of an error or a warning, or wants a warning of PEFT's"
WRAPPERS = "looks into PEFT's wrappers"
INSIDE = "tests or exchanges a function inside of PEFT"


@dataclass(frozen=True)
class Reason:
    """A reason for failures.

    Attributes:
        kind: Its kind, one of the constants above.
        text: The reason, for the page.
        error: A pattern for the text of the error; "" fits any, here and below.
        test: A pattern for the name of the test.
        line: A pattern for the line of the test that failed.
        asked: A pattern for the names of PEFT's classes that the test asked for.
    """

    kind: str
    text: str
    error: str = ""
    test: str = ""
    line: str = ""
    asked: str = ""

    def fits(self, row: dict[str, Any]) -> bool:
        """Returns whether a failed test's row matches all patterns."""
        asked = " ".join(row.get("asked", []))
        found = ((self.error, row["error"]), (self.test, row["test"]), (self.line, row["in_test"]), (self.asked, asked))
        return all(re.search(pattern, text) for pattern, text in found if pattern)


READ: tuple[Reason, ...] = (
    Reason(
        WRONG,
        "prefix tuning on configs without `head_dim`, as Qwen 2's",
        error="Config' object has no attribute 'head_dim'",
    ),
    Reason(WORDING, "another text of an error", error="built with batch_first=False", test="mixed_adapter_batches_mha"),
    Reason(
        BETTER,
        "mixed batches in training, with DoRA, and of the base alone",
        test="batches_(length|training|lora_with_dora)",
    ),
    Reason(INSIDE, "`_get_monteclora_loss`", error="no attribute '_get_monteclora_loss'"),
    Reason(
        OPEN,
        "rows of a table have their first values with `low_cpu_mem_usage`",
        test="test_load_model_low_cpu_mem_usage.*trainable_tokens",
    ),
    Reason(OPEN, "a prefix that fits no layer of Gemma 4", test="gemma4_raises_if_all"),
    Reason(WRONG, "`generate` refuses `task_ids`", error="model_kwargs` are not used by the model: \\['task_ids'"),
    Reason(
        WRONG,
        "FSDP around LoRA at `nn.MultiheadAttention`: the adapter doesn't act",
        error="allclose",
        test="fsdp_wrapped.*MHA",
    ),
    Reason(WRONG, "rows of an embedding whose name fits two tied layers", error="KeyError: .*trainable_tokens_delta"),
    # models and layers
    Reason(OPEN, "`low_cpu_mem_usage` makes no tensors on the meta device", error="'meta'|type='meta'"),
    Reason(OTHERWISE, "biases belong to each adapter", test="with_bias_raises|with_bias_argument|configs_with_bias"),
    Reason(WRAPPERS, "names of parameters", line="assert param.grad is None|lora_magnitude_vector.default"),
    Reason(WRAPPERS, "names of parameters", test="only_params_are_updated", line="allclose"),
    Reason(OPEN, "recurrent layers in `modules_to_save`", error="keeps its parameters in self._flat_weights"),
    Reason(OPEN, "FSDP: trained rows", error="property 'weight' of 'Embedding' object has no setter"),
    Reason(
        OTHERWISE,
        "`save_embedding_layers` needs `get_input_embeddings`",
        error="Raised: ValueError: save_embedding_layers",
    ),
    Reason(WRAPPERS, "counts modules by their names", line="assert num_default > 0"),
    Reason(WRAPPERS, "`repr` of wrappers", test="TestLayerRepr"),
    Reason(WRAPPERS, "classes of layers that are given to PEFT", error="_register_custom_module"),
    Reason(
        WRAPPERS,
        "`base_model.prefix` of a Transformers model, whose `base_model` is its body",
        error="no attribute 'prefix'",
    ),
    Reason(
        WRAPPERS,
        "a path through the two wrappers, as `base_model.model.model` or `base_model.lm_head`",
        error="has no attribute '(classifier|lm_head|model|qa_outputs|score|transformer)'",
    ),
    Reason(INSIDE, "exchanges a method inside of the model", test="offsets_position_ids|generation_4d_attention_mask"),
    Reason(INSIDE, "exchanges PEFT's table of default targets", error="MagicMock"),
    Reason(
        BETTER, "prompts are taken off by `unload()`", error="DID NOT RAISE AttributeError", test="test_unload_adapter"
    ),
    Reason(BETTER, "positional arguments of `generate`", error="DID NOT RAISE TypeError", test="generate_pos_args"),
    Reason(
        BETTER,
        "dictionaries and lists in `modules_to_save`",
        error="DID NOT RAISE TypeError",
        test="module_dict_raises",
    ),
    Reason(BETTER, "`nn.MultiheadAttention` with q, k and v of other sizes", test="separate_qkv_embed_raises"),
    Reason(BETTER, "adapters with other `target_parameters`", test="different_target_parameters_raises"),
    Reason(
        OTHERWISE,
        "a model without a cache is refused a prefix when it is adapted",
        error="takes no cache, where a prefix goes",
    ),
    Reason(OTHERWISE, "merging a tied weight is refused", error="which merging would change too"),
    Reason(OTHERWISE, "trained rows are merged while they are active", error="which are read while it is active alone"),
    Reason(OTHERWISE, "`lora_dropout` at `nn.MultiheadAttention` is refused", error="lora_dropout=.* drops elements"),
    Reason(OTHERWISE, "an adapter's name is taken once", error="already; choose another adapter_name"),
    Reason(
        OTHERWISE,
        "P-tuning has its encoder in training, and after loading for inference its tokens alone",
        error="^KeyError: .*prompt_(encoder|embedding)",
    ),
    Reason(
        OTHERWISE,
        "P-tuning has its encoder in training, and after loading for inference its tokens alone",
        line="state_dict.keys\\(\\) == state_dict_from_pretrained.keys",
        test="PromptEncoderConfig",
    ),
    Reason(
        OPEN, "several active adapters with DoRA at grouped convolutions", error="reads weight with the changes so far"
    ),
    Reason(OPEN, "DoRA at grouped convolutions", error="LoRA's change of them goes across groups"),
    Reason(OPEN, "DeBERTa's `in_proj` without example inputs", error="DisentangledSelfAttention's forward can't run"),
    Reason(WRONG, "Gemma 4's sizes of heads, for prefix tuning", error="AmbiguousGlobalPerLayerAttributeError"),
    Reason(WRAPPERS, "names of parameters", error="has no get_input_embeddings"),
    Reason(OTHERWISE, "another name of a test's parameters", error="^not found"),
    Reason(OPEN, "`target_parameters` of a weight that has a parametrization", test="with_existing_parametrization"),
    Reason(
        BETTER,
        "`add_weighted_adapter` of adapters of parameters",
        error="DID NOT RAISE ValueError",
        test="target_parameters.*weighted_combination",
    ),
    Reason(
        OTHERWISE,
        "`target_modules=None` stays in the caller's config",
        error="'NoneType' is not iterable",
        test="test_lora_conversion",
    ),
    Reason(WRAPPERS, "an attribute of wrappers", test="test_composite_model_short_name"),
    Reason(BETTER, "ranks that the groups of a convolution don't divide", test="rank_not_divisible_by_groups"),
    Reason(OPEN, "a padded rank in the config", test="scalings_update_config"),
    Reason(WRAPPERS, "names of parameters", test="test_lora_plus_embedding_lr"),
    Reason(OTHERWISE, "an optimizer for LoRA is for adapted models", test="lora_plus_model_without_peft_wrapper"),
    Reason(INSIDE, "what an optimizer holds", test="test_lorafa_(init_embedding|scaling_factor_deprecation)"),
    Reason(OPEN, "`forward(adapter_names=…)`", error="unexpected keyword argument 'adapter_names'"),
    Reason(OPEN, "FSDP: trained biases", error="cannot assign 'torch.FloatTensor' as parameter"),
    Reason(OPEN, "FSDP: a wrapped model isn't looked through", error="FullyShardedDataParallel has no adapters"),
    Reason(WRAPPERS, "names of parameters", test="test_training_prompt_learning_tasks", error="^AssertionError"),
    Reason(WRAPPERS, "an attribute of wrappers", error="'Holder(Group)?' object has no attribute"),
    Reason(OPEN, "`runtime_config`", error="no attribute 'runtime_config'"),
    Reason(OPEN, "`base_model.active_adapter` as a list", line="model.base_model.active_adapter =="),
    Reason(OPEN, "`bias` by a method's name in another spelling", error="not '(miss|adalora)_only'"),
    Reason(OPEN, "`disable_adapter_layers` takes `requires_grad` off", test="modules_to_save_disabling"),
    Reason(OPEN, "a dict of `peft_config` that was taken before", error="dangling attributes"),
    # configs and files
    Reason(INSIDE, "exchanges PEFT's own version", test="test_peft_version"),
    Reason(OTHERWISE, "`peft_type` is the method's", error="leave peft_type="),
    Reason(WORDING, "another class of an error", error="there is no peft_type|CheckpointError: .* a config for"),
    Reason(WORDING, "another class of an error", error="^ValueError: (bias|target_parameters) must be"),
    Reason(OTHERWISE, "`base_model_name_or_path` that is given stays", test="TestCustomModelConfigWarning"),
    Reason(WORDING, "another class of an error", error="CheckpointError: .* of shape", test="ignore_mismatched_sizes"),
    Reason(
        OPEN,
        "keys of an injected model without `base_model.model.`",
        test="TestLowLevelFunctional|InjectAdapterFromStateDict",
    ),
    # LoRA's first values
    Reason(OPEN, "CorDA on a copy of the measured model", error="measures on this very model"),
    Reason(
        OPEN, "conversion after `init_lora_weights` was set to True", error="is for adapters that have taken a part"
    ),
    Reason(OPEN, "`init_lora_weights` in other letters", error="init_lora_weights='OLoRA'"),
    Reason(
        WRAPPERS,
        "what a measurement leaves on layers",
        error="_peft_loraga_grad|covariance_matrix|sample_count|eigens",
    ),
    Reason(
        WORDING,
        "a config is checked when it is used",
        error="DID NOT RAISE ValueError",
        test="megatron_core_raises|config_raises|quantized",
    ),
    # what a model says of itself
    Reason(OTHERWISE, "`get_layer_status` has a module's path without `model.`", error="'model\\.\\w+"),
    Reason(OTHERWISE, "`adapter_model_type` is the model's class", error="'LoraModel'"),
    Reason(
        OTHERWISE, "there are no single layers with another state", error="irregular", test="TestModelAndLayerStatus"
    ),
    Reason(WRAPPERS, "sets the state of single layers", test="TestModelAndLayerStatus.*irregular"),
    Reason(WRAPPERS, "sets the state of single layers", error="bnb 8bit"),
    Reason(WRAPPERS, "scales of single layers", test="TestScaling"),
    Reason(OPEN, "`targeted_parameter_names`, and the order of `targeted_module_names`", test="targeted_|Targeted"),
    Reason(WRAPPERS, "tells layers from each other by the `weight` of wrappers", error="too many indices for tensor"),
    Reason(WRAPPERS, "tells layers from each other by the `weight` of wrappers", error="magnitude vectors"),
    Reason(WRAPPERS, "the trained copy has the attributes of a module", test="TestModulesToSaveAttributeAccess"),
    Reason(WRAPPERS, "a class of layers that is derived from PEFT's", error="^KeyError: 'kind'"),
    Reason(WRAPPERS, "finds a layer by `lora_A`", error="^KeyError: 'base_model.model.*lora_A.default"),
    Reason(
        OTHERWISE,
        "a name in `modules_to_save` that fits nothing is an error",
        error="modules_to_save names no module",
    ),
    Reason(OTHERWISE, "a table is adapted whole or by rows", error="rows of its own can't both act"),
    Reason(
        OTHERWISE, "a model with a prompt has a status, too", error="DID NOT RAISE TypeError", test="test_prefix_tuning"
    ),
    Reason(OTHERWISE, "an injected model is an adapted one", test="status_with_injected|model_with_injected_layers"),
    Reason(
        OTHERWISE,
        "biases in a state dict for an adapter that has none",
        test="learnable_bias",
        error="has no place for",
    ),
    Reason(WORDING, "another class of an error", error="CheckpointError.*has what the model has no place for"),
    Reason(OPEN, "Diffusers' attention without example inputs", error="may read its weight without calling it"),
    Reason(WORDING, "another error comes first", test="set_requires_grad_prompt_learning_raises"),
    Reason(WORDING, "another text of an error", error='AssertionError: assert "[^"]+" in'),
    Reason(WRAPPERS, "names of parameters", error="to require gradients, got"),
    Reason(WRAPPERS, "an attribute of wrappers", error="Tensor.__contains__ only supports"),
    Reason(
        OTHERWISE,
        "OFT rotates the channels of a convolution, and PEFT's blocks of its kernel fit none",
        error="features fall into blocks of one",
    ),
    Reason(OTHERWISE, "what has taken a part of a weight isn't merged in place", error="has taken a part of"),
    Reason(
        OTHERWISE,
        "adapters that train the same tensor aren't active together",
        error="both (fully )?train|both have another tensor",
        test="test_active_adapter|different_modules_to_save",
    ),
    Reason(OTHERWISE, "dropout that could have no effect is refused", error="dropout drops|no branch for miss_dropout"),
    Reason(OTHERWISE, "an AdaMSS file of another base is refused", error="CheckpointError: .*adamss_B"),
    Reason(
        OTHERWISE, "two AdaLoRA adapters can be trained", error="DID NOT RAISE ValueError", test="requires_grad_set"
    ),
    Reason(OPEN, "frozen tensors that sites share are parameters", error="uniform dtype|Parameter containing"),
    Reason(OPEN, "frozen tensors that sites share are parameters", test="test_adapter_dtype_autocast"),
    Reason(OTHERWISE, "tensors drawn at their first use differ after loading", test="parameters_after_loading_model"),
    Reason(NAMES, "`prepare_model_for_gradient_checkpointing`", error="prepare_model_for_gradient_checkpointing"),
)
