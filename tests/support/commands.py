"""The command line in this process."""

from s2ft.cli.main import main


def s2ft_command(*words) -> int:
    """Run s2ft with these words, of any type. Returns the exit status."""
    return main([str(word) for word in words])


def files_of(work, output) -> list[str]:
    """The options that name the model and the rows of a folder of tests/cli, and the output."""
    return ["--model", str(work / "model"), "--data", str(work / "data.jsonl"), "--output", str(output)]
