"""A policy as a document: what the operator may change without touching the code."""

from pathlib import Path

from hallucination_guard import AuditLog, Calibration, Guard, WhiteBoxModel
from hallucination_guard_policies import load_policy

policy = load_policy(Path(__file__).with_name("second_look.yaml"))
guard = Guard(
    WhiteBoxModel.demo(),
    policy=policy,
    calibration=Calibration.of_demo(),
    audit=AuditLog("audit.jsonl"),
    generation={"max_new_tokens": 24},
)
print(f"policy {policy.id} version {policy.version}, {policy.hash[:12]}")
for question in ("What is the opposite of up?", "Who is the main character of the novel Things Fall Apart?"):
    outcome = guard(f"Please directly answer the following question with one or few words:\n{question}")
    print(f"{question} → {outcome.text}")
    print(f"  {outcome.decision.action} after {outcome.attempts} attempt(s): {outcome.decision.reason}")
