"""Property tests of adapters and rewrites: the laws, and strategies for models with inputs, configs and edits.

The laws, `verify` and `verify_rewrite` need no further package. The files `strategies`, `edits` and `profiles` need
hypothesis, from ``pip install 'graphpeft[testing]'``; import from them directly.
"""

from graphpeft.testing.comparing import LawError
from graphpeft.testing.copies import assert_copies_stay_adapted
from graphpeft.testing.laws import (
    assert_adapted_is_base_with_delta,
    assert_dry_runs_change_nothing,
    assert_fresh_adapter_changes_no_output,
    assert_only_the_adapter_is_trained,
    assert_saved_is_loaded,
    assert_spellings_are_adapted_alike,
    assert_traced_is_adapted_alike,
    assert_traced_is_the_model,
    assert_traced_trains_as_the_model,
)
from graphpeft.testing.rewrites import (
    assert_rewrite_changes_nodes,
    assert_rewrite_is_undone,
    assert_rewrite_leaves_the_original,
    assert_rewritten_computes_the_same,
    assert_rewritten_has_the_same_gradients,
    assert_rewritten_is_compiled,
    verify_rewrite,
)
from graphpeft.testing.two_adapters import assert_two_adapters_act_together
from graphpeft.testing.verdicts import Verdict, Verification
from graphpeft.testing.verify import verify

__all__ = [
    "LawError",
    "Verdict",
    "Verification",
    "assert_adapted_is_base_with_delta",
    "assert_copies_stay_adapted",
    "assert_dry_runs_change_nothing",
    "assert_fresh_adapter_changes_no_output",
    "assert_only_the_adapter_is_trained",
    "assert_rewrite_changes_nodes",
    "assert_rewrite_is_undone",
    "assert_rewrite_leaves_the_original",
    "assert_rewritten_computes_the_same",
    "assert_rewritten_has_the_same_gradients",
    "assert_rewritten_is_compiled",
    "assert_saved_is_loaded",
    "assert_spellings_are_adapted_alike",
    "assert_traced_is_adapted_alike",
    "assert_traced_is_the_model",
    "assert_traced_trains_as_the_model",
    "assert_two_adapters_act_together",
    "verify",
    "verify_rewrite",
]
