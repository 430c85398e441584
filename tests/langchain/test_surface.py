"""The package as an object: what importing, copying, printing and serialising it does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from langchain_core.load import dumps, loads

import hallucination_guard_langchain
from hallucination_guard_langchain import GuardRunnable


@pytest.mark.parametrize(
    "module", ["hallucination_guard", "hallucination_guard_policies", "hallucination_guard_langchain"]
)
def test_importing_it_does_not_load_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_importing_the_guard_does_not_load_langchain() -> None:
    program = "import sys, hallucination_guard.guard; sys.exit('langchain_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_public_names_are_these() -> None:
    assert hallucination_guard_langchain.__all__ == [
        "AuditCallback",
        "GuardNodes",
        "GuardRunnable",
        "GuardState",
        "GuardedChatModel",
        "HallucinationGuardMiddleware",
        "HeldAnswers",
        "LowConfidenceError",
        "VerdictChatOpenAI",
        "add_guard",
        "unsure_call",
        "way_on",
    ]
    for name in hallucination_guard_langchain.__all__:
        assert getattr(hallucination_guard_langchain, name) is not None


def test_importing_it_loads_no_agents() -> None:
    program = "import sys, hallucination_guard_langchain; sys.exit(bool({'langgraph', 'langchain'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("name", ["HallucinationGuardMiddleware", "add_guard", "HeldAnswers"])
def test_what_needs_an_extra_says_which(name: str) -> None:
    program = f"""
import sys
sys.modules["langgraph"] = sys.modules["langchain"] = None
import hallucination_guard_langchain
hallucination_guard_langchain.{name}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "hallucination-guard-semgrad[agents]" in run.stderr


def test_a_copy_shares_the_guard(open_model: Any) -> None:
    assert open_model.model_copy(update={"abstention": "Pass."}).guard is open_model.guard


def test_a_copy_answers_the_same(open_model: Any) -> None:
    assert open_model.model_copy().invoke("Hm?").content == open_model.invoke("Hm?").content


@pytest.fixture(params=["model", "runnable"])
def held(request: Any, open_model: Any) -> Any:
    return open_model if request.param == "model" else GuardRunnable(open_model, open_model.guard)


def test_printing_it_shows_no_weights(held: Any) -> None:
    assert "Llama" not in repr(held) and "tensor" not in repr(held) and len(repr(held)) < 1000


def test_dumping_its_fields_leaves_the_guard_out(open_model: Any) -> None:
    assert "guard" not in open_model.model_dump()


def test_it_is_not_serialisable(held: Any) -> None:
    assert not held.is_lc_serializable()


def test_what_is_serialised_all_the_same_has_no_weights(held: Any) -> None:
    assert "Llama" not in dumps(held) and "tensor" not in dumps(held)


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
def test_it_can_not_be_loaded_from_what_was_serialised(held: Any) -> None:
    with pytest.raises((NotImplementedError, ValueError)):
        loads(dumps(held), allowed_objects="core")


def test_one_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="guard"):
        hallucination_guard_langchain.GuardedChatModel()


def test_an_unknown_way_to_abstain_is_refused(open_model: Any) -> None:
    with pytest.raises(ValueError, match="on_abstain"):
        hallucination_guard_langchain.GuardedChatModel(guard=open_model.guard, on_abstain="shrug")
