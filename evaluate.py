"""Evaluate a model, or with --retrieve_only its retriever: `torchrun ... evaluate.py --task ...` or plain `python`."""

from atlas.config import parse_config


def main() -> None:
    """Parse, build, run."""
    config = parse_config(program="evaluate")
    from atlas import build  # imports torch: a wrong flag is answered before that

    build.run(config, build.evaluate)


if __name__ == "__main__":
    main()
