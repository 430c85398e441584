"""A graph that asks, looks doubtful answers up, and has the rest wait in a queue of drafts: no checkpoint holds one."""

import sqlite3
import sys

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command

from hallucination_guard import AuditLog, Guard, WhiteBoxModel
from hallucination_guard.demo import BM25Retriever
from hallucination_guard.values import Passage
from hallucination_guard_langchain import GuardState, HeldAnswers, add_guard
from hallucination_guard_policies import EscalateBelow, RetrieveBelow

NOTES = ["The office dog is called Biscuit.", "The warehouse in Tarvel opens at six."]
HANDBOOK = BM25Retriever([Passage(id=f"handbook-{at}", text=text) for at, text in enumerate(NOTES)], k=1)

doubt = {"score": "mean_token_entropy", "limit": 1.7}
policy = RetrieveBelow(retriever=HANDBOOK, k=1, **doubt) | EscalateBelow(to=None, **doubt)
guard = Guard(WhiteBoxModel.demo(), policy=policy, audit=AuditLog("audit.jsonl"), generation={"max_new_tokens": 48})
held = HeldAnswers("held.db")
builder = StateGraph(GuardState)
add_guard(builder, guard, held)  # generate → score → decide → review, and back
builder.add_edge(START, "generate")
graph = builder.compile(checkpointer=SqliteSaver(sqlite3.connect("graph.db", check_same_thread=False)))

if sys.argv[1:] == ["approve"]:  # another process, the next day: all that waits, of every conversation
    for each in held.waiting():
        said = Command(resume={"decisions": [{"type": "approve"}]})
        print(graph.invoke(said, {"configurable": {"thread_id": each.thread_id}})["messages"][-1].text)
else:
    asked = {"messages": sys.argv[1] if sys.argv[1:] else "When does the warehouse open?"}
    state = graph.invoke(asked, {"configurable": {"thread_id": "1"}})
    print(state["hallucination_guard"]["way"], state["messages"][-1].text, [each.actions for each in held.waiting()])
