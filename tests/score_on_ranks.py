"""Scores a toy stream with adapters on as many ranks as torchrun started, twice: whole, and with a journal that loses
its end; each rank writes both scores and the documents that it had into a file of its own (ranks share one terminal,
where their lines can mix)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixture_fixtures import MODEL
from test_adapters import SCORE, SETTINGS, STREAM, OneByte

from golf.config.run import RunConfig
from golf.model.init import build_model
from golf.runtime import Log, Runtime, leave, start_runtime
from golf.score.adapted import score_adapted
from golf.score.journal import ScoreJournal
from golf.score.mixture import NetworkNats


def main(folder: Path) -> None:
    with start_runtime(RunConfig(device="cpu", compile="off", threads=1), "score", Log(sys.stderr)) as runtime:
        journal = ScoreJournal(folder / f"rank{runtime.rank}.jsonl")
        journal.start({"what": "test"})
        whole, had = score(runtime, journal), len(journal.chunks)
        kept = journal.chunks[: had // 2]
        journal.chunks[:] = kept  # as after a kill in which the rest was not journaled: other ranks may claim it
        resumed = score(runtime, journal)
        found = {"scores": [whole, resumed], "documents": [had, len(journal.chunks) - len(kept)]}
        (folder / f"found{runtime.rank}.json").write_text(json.dumps(found))


def score(runtime: Runtime, journal: ScoreJournal) -> tuple[float, int, int]:
    nats = NetworkNats(len(STREAM) - 1, journal)
    model = build_model(MODEL, seed=0).eval()
    done = score_adapted(model, STREAM, OneByte(), SETTINGS, SCORE, runtime, journal=journal, recorder=nats.record)
    nats.gather(done.nats, runtime)
    return done.nats, done.tokens, done.bytes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
