"""The audit log: every attempt, why it was let through or not, and proof that nothing was changed since."""

from collections import Counter

from hallucination_guard import AuditLog, Calibration, Guard, WhiteBoxModel
from hallucination_guard.audit import records, verify
from hallucination_guard_policies import load_policy

LOG = "audit.jsonl"
with AuditLog(LOG) as log:
    guard = Guard(WhiteBoxModel.demo(), policy=load_policy("abstain"), calibration=Calibration.of_demo(), audit=log)
    for question in ("What is the capital of Italy?", "What is the currency of Hungary?", "Who was George Orwell?"):
        guard(f"Please directly answer the following question with one or few words:\n{question}", max_new_tokens=24)

checked = verify(LOG)
print(f"{checked.records} records, {'whole and unchanged' if checked.ok else checked.problems}")
print("decisions:", dict(Counter(record.decision for record in records(LOG))))
for record in records(LOG):
    if record.decision == "abstain":
        print(f"{record.time[:19]} {record.id[:8]} withheld {record.answer!r}: {record.reason}")
