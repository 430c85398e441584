"""An agent whose doubtful answers are looked up, scored again, and wait for a human if they stay doubtful."""

import sqlite3
import sys

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from hallucination_guard import AuditLog, Guard, WhiteBoxModel
from hallucination_guard.demo import BM25Retriever
from hallucination_guard.values import Passage
from hallucination_guard_langchain import GuardedChatModel, HallucinationGuardMiddleware
from hallucination_guard_policies import EscalateBelow, RetrieveBelow

NOTES = ["The office dog is called Biscuit.", "The warehouse in Tarvel opens at six."]
HANDBOOK = BM25Retriever([Passage(id=f"handbook-{at}", text=text) for at, text in enumerate(NOTES)], k=1)


def multiply(a: int, b: int) -> str:
    """Multiply two whole numbers."""
    return str(a * b)


def search_handbook(query: str) -> str:
    """Search the company's handbook."""
    return HANDBOOK.invoke(query)[0].text


@wrap_model_call
def call_first(request, handler):
    """Demand a tool once: a model this small calls none of its own accord."""
    return handler(request.override(tool_choice="any" if request.messages[-1].type == "human" else "none"))


doubt = {"score": "mean_token_entropy", "limit": 1.7}
policy = RetrieveBelow(retriever=HANDBOOK, k=1, **doubt) | EscalateBelow(to=None, **doubt)
guard = Guard(WhiteBoxModel.demo(), policy=policy, audit=AuditLog("audit.jsonl"), generation={"max_new_tokens": 48})
agent = create_agent(
    GuardedChatModel(guard=guard),
    tools=[multiply, search_handbook],
    middleware=[call_first, HallucinationGuardMiddleware(guard)],
    checkpointer=SqliteSaver(sqlite3.connect("agent.db", check_same_thread=False)),
)
thread, said = sys.argv[1:] or ("1", "When does the warehouse open?")
asked = Command(resume={"decisions": [{"type": said}]}) if said in ("approve", "reject") else {"messages": said}
state = agent.invoke(asked, {"configurable": {"thread_id": thread}})
waiting = [each.value["action_requests"][0]["args"] for each in state.get("__interrupt__", ())]
print(state["messages"][-1].text, *(f"(waits for a human: {each})" for each in waiting))
