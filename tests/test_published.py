"""Which files a download takes, from lists of files in the layouts that there are. pytest tests/test_published.py"""

import hashlib
from pathlib import Path

import pytest

from lab.prepare.published import (
    DownloadError,
    HubListing,
    find_dataset_folder,
    manifest_path_of,
    plan_download,
    repository_of,
)
from lab.prepare.verification import FileFacts

CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
CASEOPS_MODEL = "datasets/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"


def shard_paths(folder: str, train: range, val: int = 1) -> list[str]:
    return [f"{folder}/fineweb_val_{index:06d}.bin" for index in range(val)] + [
        f"{folder}/fineweb_train_{index:06d}.bin" for index in train
    ]


def listing_of(*paths: str) -> HubListing:
    sha256 = {path: hashlib.sha256(path.encode()).hexdigest() for path in paths}
    return HubListing("some/where", "c" * 40, {path: FileFacts(100, sha256[path]) for path in paths})


@pytest.fixture
def both() -> HubListing:
    """An export with two data sets and their tokenizers."""
    paths = shard_paths("datasets/datasets/fineweb10B_sp1024", range(195))
    paths += shard_paths("datasets/datasets/fineweb10B_sp8192", range(100))
    models = [f"datasets/tokenizers/fineweb_{size}_bpe.{end}" for size in (1024, 8192) for end in ("model", "vocab")]
    return listing_of(*paths, *models, "datasets/manifest.json", "datasets/docs_selected.jsonl")


def names_of(plan, kind: str) -> list[str]:
    return [wanted.local.name for wanted in plan.files if wanted.kind == kind]


def test_variants_have_their_repositories():
    assert repository_of("sp1024") == repository_of("byte260") == "willdepueoai/parameter-golf"
    assert repository_of("caseops") == "romeerp/parameter-golf-caseops-v1"


def test_by_default_all_validation_and_the_first_eighty_training_shards(both):
    plan = plan_download(both, "sp1024", Path("root"))
    assert names_of(plan, "train") == [f"fineweb_train_{index:06d}.bin" for index in range(80)]
    assert names_of(plan, "val") == ["fineweb_val_000000.bin"]
    assert names_of(plan, "tokenizer") == ["fineweb_1024_bpe.model"]
    assert plan.published == {"val": 1, "val bytes": 0, "train": 195}
    first = plan.files[0]
    assert first.local == Path("root/datasets/fineweb10B_sp1024/fineweb_val_000000.bin")
    assert (first.facts.sha256, first.facts_from) == (hashlib.sha256(first.remote.encode()).hexdigest(), "hub")
    assert len(plan_download(both, "sp8192", Path("root"), 100).files) == 102


def test_the_manifest_names_the_tokenizer_and_its_vocabulary(both):
    manifest = {
        "datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "t", "vocab_size": 1024}],
        "tokenizers": [
            {
                "name": "t",
                "model_path": "tokenizers/fineweb_8192_bpe.model",
                "vocab_path": "tokenizers/fineweb_8192_bpe.vocab",
            }
        ],
    }
    assert manifest_path_of(both, "datasets/datasets/fineweb10B_sp1024") == "datasets/manifest.json"
    plan = plan_download(both, "sp1024", Path("root"), 1, manifest)
    assert names_of(plan, "tokenizer") == ["fineweb_8192_bpe.model", "fineweb_8192_bpe.vocab"]
    assert plan.vocab_size == 1024


def test_caseops_comes_with_its_sidecar_and_without_a_manifest():
    sidecar = f"datasets/datasets/{CASEOPS}/fineweb_val_bytes_000000.bin"
    paths = shard_paths(f"datasets/datasets/{CASEOPS}", range(80))
    listing = listing_of(*paths, sidecar, CASEOPS_MODEL, "datasets/tokenizers/fineweb_8192_bpe.model", "README.md")
    plan = plan_download(listing, "caseops", Path("root"), 2)
    assert names_of(plan, "val bytes") == ["fineweb_val_bytes_000000.bin"]
    assert names_of(plan, "tokenizer") == [CASEOPS_MODEL.split("/")[-1]]
    assert names_of(plan, "train") == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]


def test_shards_at_the_root_that_count_from_one():
    plan = plan_download(listing_of(*(path[2:] for path in shard_paths(".", range(1, 104)))), "gpt2", Path("root"), 2)
    assert names_of(plan, "train") == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert plan.folder == Path("root/datasets/fineweb10B_gpt2") and names_of(plan, "tokenizer") == []


def test_byte260_takes_its_json():
    paths = shard_paths("datasets/datasets/fineweb10B_byte260", range(2))
    tokenizers = ["datasets/tokenizers/fineweb_pure_byte_260.json", "datasets/tokenizers/fineweb_1024_bpe.model"]
    plan = plan_download(listing_of(*paths, *tokenizers), "byte260", Path("root"))
    assert names_of(plan, "tokenizer") == ["fineweb_pure_byte_260.json"]


def test_a_manifest_may_hold_hashes(both):
    known = {"name": "datasets/fineweb10B_sp1024/fineweb_val_000000.bin", "bytes": 100, "sha256": "0" * 64, "tokens": 7}
    entry = {"name": "fineweb10B_sp1024", "files": [known]}
    with pytest.raises(DownloadError, match="val_000000.bin: the hub and the export's manifest disagree on its sha256"):
        plan_download(both, "sp1024", Path("root"), 1, {"datasets": [entry]})
    hub_says = both.files["datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"].sha256
    entry["files"] = {"fineweb_val_000000.bin": known | {"sha256": hub_says}}
    first = plan_download(both, "sp1024", Path("root"), 1, {"datasets": [entry]}).files[0]
    assert (first.facts.sha256, first.facts.tokens, first.facts_from) == (hub_says, 7, "manifest")


@pytest.mark.parametrize(
    "manifest",
    [{}, {"datasets": 3}, {"datasets": [3, {"name": "fineweb10B_sp1024", "stats": 3, "files": 3, "vocab_size": "x"}]}],
)
def test_a_strange_manifest_does_no_harm(both, manifest):
    assert len(plan_download(both, "sp1024", Path("root"), 1, manifest).files) == 3


def test_what_can_not_be_had_is_said(both):
    gap = listing_of(*shard_paths("d/fineweb10B_sp1024", range(2)), "d/fineweb10B_sp1024/fineweb_train_000003.bin")
    cases = [
        (both, "sp512", None, None, "does not have sp512; it has fineweb10B_sp1024, fineweb10B_sp8192"),
        (both, "caseops", None, None, "does not have caseops"),
        (both, "sp1024", 196, None, "196 training shards wanted, there are 195"),
        (both, "sp1024", None, {"files_val": 2}, "there are 1 validation shards of 2"),
        (listing_of("README.md"), "sp1024", None, None, "it has no shards at all"),
        (gap, "sp1024", None, None, "gaps in the numbers of the train shards"),
        (listing_of("a/fineweb10B_sp1024/fineweb_train_000000.bin"), "sp1024", None, None, "0 validation shards"),
    ]
    for listing, variant, train_shards, stats, message in cases:
        manifest = {"datasets": [{"name": "fineweb10B_sp1024", "stats": stats}]}
        with pytest.raises(DownloadError, match=message):
            plan_download(listing, variant, Path("root"), train_shards, manifest)
    assert len(plan_download(gap, "sp1024", Path("root"), 2).files) == 3  # the gap lies behind what is asked for


def test_an_ambiguous_name_is_an_error():
    listing = listing_of(*shard_paths("a/fineweb10B_sp1024", range(2)), *shard_paths("b/fineweb10B_sp1024", range(2)))
    with pytest.raises(DownloadError, match="several folders for sp1024"):
        find_dataset_folder(listing, "sp1024")
    models = [f"tokenizers/{name}.model" for name in ("one", "two")]
    with pytest.raises(DownloadError, match="can't tell which"):
        plan_download(listing_of(*shard_paths("a/fineweb10B_sp1024", range(2)), *models), "sp1024", Path("root"))


@pytest.mark.parametrize("name", ["..", ".hidden", "a b"])
def test_names_that_could_leave_their_folder_are_refused(name):
    listing = listing_of(*shard_paths(f"x/{name}", range(2)))
    with pytest.raises(DownloadError, match="is no name for a file or folder"):
        plan_download(listing, name, Path("root"))
