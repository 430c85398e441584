"""Retrieval only when it is needed: a doubtful answer is looked up, and withheld if it stays doubtful.

The chain's retriever is any LangChain retriever. The prompt is first answered from memory; when the guard doubts the
answer, the passages are put into the prompt, and the new answer is scored again.
"""

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from hallucination_guard import AuditLog, Calibration, Guard, WhiteBoxModel
from hallucination_guard.demo import BM25Retriever
from hallucination_guard.values import Passage
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_policies import AbstainBelow, RetrieveBelow

NOTES = [
    Passage(id="handbook-3", text="The warehouse in Tarvel opens at six in the morning and closes at nine at night."),
    Passage(id="handbook-7", text="Parcels over thirty kilograms are handed over at gate B of the warehouse."),
    Passage(id="handbook-9", text="The office dog is called Biscuit."),
]


class Handbook(BaseRetriever):
    """The company's handbook, searched by BM25."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = BM25Retriever(NOTES, k=2).invoke(query)
        return [Document(id=passage.id, page_content=passage.text) for passage in found]


policy = RetrieveBelow(confidence=0.5, retriever=Handbook(), k=2) | AbstainBelow(confidence=0.5)
guard = Guard(
    WhiteBoxModel.demo(),
    policy=policy,
    calibration=Calibration.of_demo(),
    audit=AuditLog("audit.jsonl"),
    generation={"max_new_tokens": 24},
)
chat = GuardedChatModel(guard=guard, abstention="I do not know; please ask at the desk.")
for question in (
    "What is the capital of France?",
    "What is the office dog called?",
    "What is the maiden name of the manager of the warehouse in Tarvel?",
):
    answer = chat.invoke(f"Please directly answer the following question with one or few words:\n{question}")
    verdict = answer.response_metadata["hallucination_guard"]
    print(f"{question}\n  → {answer.content}")
    confidence = "none" if verdict["confidence"] is None else f"{verdict['confidence']:.2f}"
    print(f"    {verdict['decision']} by {verdict['rule']}, confidence {confidence}, from {verdict['retrieved']}")
