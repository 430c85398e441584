"""``make soak MINUTES=5``: many threads, random faults, one guard and one log; memory stays flat and the chain whole.

Sixteen threads ask, review and verify against a tiny white-box model, with a retriever, an escalation, a sink and a
scorer that fail now and then. At the end every delivered text has its accepting record in the log.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from hallucination_guard import AuditLog, Guard, HybridGrad, WhiteBoxModel
from hallucination_guard.audit import records, verify
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.errors import GuardError
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetrieveBelow, RetryBelow

THREADS = 16
FAULTS = 0.05
BELOW: dict[str, Any] = {"score": "mean_nll", "limit": 3.8}


class Fails(Exception):
    """A fault."""


def sometimes(random: Random) -> None:
    """Raise now and then."""
    if random.random() < FAULTS:
        raise Fails("random fault")


class Scorer:
    """HybridGrad that fails now and then."""

    def __init__(self) -> None:
        self.own, self.random = HybridGrad(), Random(1)
        self.identity, self.primary = self.own.identity, self.own.primary

    def batch(self, model: Any, generations: Any) -> Any:
        sometimes(self.random)
        return self.own.batch(model, generations)


def main(minutes: float) -> int:
    """Run, and say what was seen; 1 if something was wrong."""
    random, ended = Random(2), time.monotonic() + 60 * minutes
    delivered: list[str] = []
    raised = calls = 0
    problems: list[str] = []
    counting = threading.Lock()

    def search(query: str) -> list[str]:
        sometimes(random)
        return ["a passage about " + query]

    def target(messages: Any) -> str:
        sometimes(random)
        return "the target's answer"

    with TemporaryDirectory() as folder:
        path = Path(folder) / "audit.jsonl"
        log = AuditLog(path, key=b"soak", fsync=False)

        def sink(record: AuditRecord) -> str:
            sometimes(random)
            return log(record)

        policy = (
            RetryBelow(**BELOW, times=1)
            | RetrieveBelow(**BELOW, retriever=search)
            | EscalateBelow(score="mean_nll", limit=5.5, to=target)
            | AbstainBelow(**BELOW)
        )
        model = WhiteBoxModel(tiny_model(), tiny_tokenizer(), name="tiny")
        guard = Guard(model, policy=policy, scorer=Scorer(), audit=sink, generation={"max_new_tokens": 6})

        def work(seed: int) -> None:
            nonlocal calls, raised
            own = Random(seed)
            while time.monotonic() < ended and not problems:
                asked = [f"Question {own.random()}?" for _ in range(own.randint(1, 3))]
                try:
                    if own.random() < 0.2:
                        outcomes = [guard.review(asked[0], "something else wrote this")]
                    else:
                        outcomes = guard.batch(asked, temperature=own.choice([0.0, 1.0]), seed=own.randrange(1000))
                except (GuardError, Fails):
                    with counting:
                        calls, raised = calls + 1, raised + 1
                    continue
                except BaseException as error:
                    problems.append(f"{type(error).__name__} left a call: {error}")
                    return
                with counting:
                    calls += 1
                    delivered.extend(each.audit_ids[-1] for each in outcomes if each.text is not None)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for each in threads:
            each.start()
        time.sleep(min(30.0, 20 * minutes))  # until everything has been loaded once
        before = _resident()
        for each in threads:
            each.join()
        after = _resident()
        log.close()
        found = verify(path, b"soak")
        kept = {record.id: record.decision for record in records(path)}
    if not found.ok:
        problems.append(f"the log is not whole: {found.problems[:3]}")
    if wrong := [each for each in delivered if kept.get(each) not in ("accept", "escalate")]:
        problems.append(f"{len(wrong)} delivered texts have no accepting record")
    # What the test itself remembers grows with the calls: a record id each.
    allowed = 64 + 300 * (len(delivered) + calls) / 2**20
    if after - before > allowed:
        problems.append(f"memory grew by {after - before:.0f} MiB")
    sys.stdout.write(
        f"{minutes:g} min, {THREADS} threads: {calls} calls, {raised} ended by a fault, {len(delivered)} texts "
        f"delivered, {len(kept)} records, chain {'whole' if found.ok else 'BROKEN'}, memory {before:.0f} → "
        f"{after:.0f} MiB (peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f})\n"
    )
    for problem in problems:
        sys.stdout.write(f"PROBLEM: {problem}\n")
    return 1 if problems else 0


def _resident() -> float:
    """MiB in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.exit(main(float(sys.argv[1])))
