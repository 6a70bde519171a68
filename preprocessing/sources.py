"""The addresses of all downloads: the released files and the original files of the data sets."""

RELEASED = "https://dl.fbaipublicfiles.com/atlas"  # {RELEASED}/{key}/{file}
SIZES = ("base", "large", "xl", "xxl")
FAMILIES = ("atlas", "atlas_nq")
SHARDS = 128

# Key to files, both at the address above and in {output_directory}/{key}/.
CORPORA = {
    f"corpora/wiki/{dump}": ("text-list-100-sec.jsonl", "infobox.jsonl")
    for dump in ("enwiki-dec2017", "enwiki-dec2018", "enwiki-aug2019", "enwiki-dec2020", "enwiki-dec2021")
}
MODELS = {f"models/{family}/{size}": ("model.pth.tar",) for family in FAMILIES for size in SIZES}
INDICES = {
    f"indices/{family}/wiki/{size}": tuple(
        f"{kind}.{i}.pt" for i in range(SHARDS) for kind in ("passages", "embeddings")
    )
    for family in FAMILIES
    for size in SIZES
}

# Original files of the data sets. A mirror has them in one directory, named by the last part of their addresses.
_NQ = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open"
QA = (
    "https://dl.fbaipublicfiles.com/FiD/data/dataindex.tar.gz",
    f"{_NQ}/NQ-open.train.jsonl",
    f"{_NQ}/NQ-open.dev.jsonl",
    "http://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
)
FEVER = tuple(
    f"https://fever.ai/download/fever/{name}.jsonl" for name in ("train", "shared_task_dev", "shared_task_test")
)
MMLU = ("https://people.eecs.berkeley.edu/~hendrycks/data.tar",)
TEMPLAMA = tuple(f"https://storage.googleapis.com/gresearch/templama/{name}.json" for name in ("train", "val", "test"))

# Most bytes that an archive may contain: several times what it contained when it was released.
UNPACKED_LIMIT = {"dataindex.tar.gz": 64 << 20, "triviaqa-unfiltered.tar.gz": 16 << 30, "data.tar": 2 << 30}
