"""Train reader and retriever: `torchrun --standalone --nproc_per_node N train.py --task ... ` or plain `python`."""

from atlas.config import parse_config


def main() -> None:
    """Parse, build, run."""
    config = parse_config(program="train")
    from atlas import build  # imports torch: a wrong flag is answered before that

    build.run(config, build.train)


if __name__ == "__main__":
    main()
