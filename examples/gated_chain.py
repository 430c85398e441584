"""A confidence gate around the model step of a LangChain chain."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from hallucination_guard import AuditLog, Calibration, Guard, WhiteBoxModel
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_policies import AbstainBelow

model = WhiteBoxModel.demo()  # yours: WhiteBoxModel(hf_model, tokenizer), or WhiteBoxModel.from_pretrained("…")
policy = AbstainBelow(confidence=0.5)
guard = Guard(model, policy=policy, calibration=Calibration.of_demo(), audit=AuditLog("audit.jsonl"))
chat = GuardedChatModel(guard=guard, max_tokens=24)
chain = ChatPromptTemplate.from_template("Answer with one or few words:\n{question}") | chat | StrOutputParser()
for question in ("What is the capital of France?", "Who composed the ballet Swan Lake?"):
    print(f"{question} → {chain.invoke({'question': question})}")
