"""`python -m minillm`: generate, demo, doctor, bench.

Nothing heavy is imported before the arguments are understood, so `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from minillm.errors import MiniLLMError

if TYPE_CHECKING:
    from minillm.doctor import Check
    from minillm.request import RequestOutput

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
MAX_NEW_TOKENS = 200

# Name, type or choices, help. Each becomes `--name`; only what is given is passed on: the defaults are the library's.
ENGINE_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("device", str, "auto, cpu, cuda or cuda:N"),
    ("dtype", ("auto", "float32", "bfloat16", "float16"), "of weights and KV cache"),
    ("kernels", ("auto", "flashinfer", "reference"), "FlashInfer, or its twin in plain PyTorch"),
    ("page_size", int, "tokens in a page of the KV cache, 1 to 64"),
    ("num_pages", int, "pages of the KV cache (default: as many as fit)"),
    ("memory_fraction", float, "share of the device's memory to use"),
    ("max_running", int, "requests that may share a step"),
    ("max_batch_tokens", int, "tokens that may share a step"),
    ("max_model_len", int, "tokens of a prompt and its output together"),
    ("tensor_parallel_size", int, "GPUs (on CPU: processes) that share each layer"),
)
SAMPLING_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", int, f"how long the output may get (default: {MAX_NEW_TOKENS})"),
    ("min_tokens", int, "hold every stop back until then"),
    ("temperature", float, "0 is greedy"),
    ("top_k", int, "keep the k most probable tokens"),
    ("top_p", float, "keep the most probable tokens that add up to p"),
    ("min_p", float, "keep tokens at least p times as probable as the best"),
    ("repetition_penalty", float, "above 1: say less of what was said"),
    ("seed", int, "the same seed tells the same story"),
    ("n", int, "outputs for each prompt"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"minillm: error: {message} (try: {self.prog} --help)\n")


def add_options(parser: argparse.ArgumentParser, title: str, options: Sequence[tuple[str, Any, str]]) -> None:
    """Add a group of options that have no default of their own."""
    group = parser.add_argument_group(title)
    for name, kind, text in options:
        flag = "--" + name.replace("_", "-")
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(kind, tuple):
            group.add_argument(flag, choices=kind, **settings)
        else:
            metavar = {int: "N", float: "X"}.get(kind, "NAME")
            group.add_argument(flag, type=kind, metavar=metavar, **settings)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a checkpoint folder or a hub name (default: the bundled story model)")
    add_options(parser, "engine", ENGINE_OPTIONS)
    parser.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        default=argparse.SUPPRESS,
        help="forget the pages of ended requests",
    )


def make_parser() -> Parser:
    """The parser of every command but `bench`, which has its own."""
    parser = Parser(
        prog="minillm",
        description="An LLM inference engine that one person can read in an afternoon.",
        epilog="Each command has its own help: minillm generate --help",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(
        name: str, usage: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            usage=f"%(prog)s {usage}",
            description=text[0].upper() + text[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  python -m minillm {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    generate = command(
        "generate",
        "[options] PROMPT [PROMPT ...]",
        run_generate,
        "continue a prompt",
        'generate "Once upon a time" --stream',
        'generate "The old king" "A young fox" --temperature 0 --max-tokens 40',
        "generate --model ./Qwen3-0.6B --top-p 0.9 --seed 7 - < prompt.txt",
    )
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue; - reads it from stdin")
    generate.add_argument("--stream", action="store_true", help="show the text as it grows (one prompt)")
    generate.add_argument("--no-echo", action="store_true", help="show the new text only, not the prompt before it")
    add_engine_options(generate)
    add_options(generate, "sampling", SAMPLING_OPTIONS)
    for name, kind, metavar, text in (
        ("stop", str, "TEXT", "end before this text; may be given several times"),
        ("stop_token_ids", int, "ID", "end with this token; may be given several times"),
    ):
        generate.add_argument(
            "--" + name.removesuffix("_ids").replace("_", "-"),
            dest=name,
            type=kind,
            metavar=metavar,
            action="append",
            default=argparse.SUPPRESS,
            help=text,
        )
    generate.add_argument(
        "--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="do not stop at the model's end token"
    )

    demo = command(
        "demo",
        "[options]",
        run_demo,
        "tell several stories at once, and watch the batch and the pages",
        "demo",
        "demo --stories 8 --max-running 8 --every 1",
        "demo --num-pages 24        # too few: requests are preempted, and come back",
    )
    demo.add_argument("--stories", type=int, default=6, metavar="N", help="how many (default: 6, at most 26)")
    demo.add_argument("--every", type=int, default=8, metavar="N", help="also show every Nth quiet step (default: 8)")
    demo.add_argument("--no-color", action="store_true", help="plain text, also on a terminal")
    add_engine_options(demo)
    add_options(demo, "sampling", tuple(o for o in SAMPLING_OPTIONS if o[0] in ("max_tokens", "temperature", "seed")))

    doctor = command(
        "doctor", "[--gpu]", run_doctor, "say what works on this machine, what does not, and what to do", "doctor"
    )
    doctor.add_argument("--gpu", action="store_true", help="fail, too, if FlashInfer cannot run on a GPU here")
    commands.add_parser("bench", help="measure this engine, beside its peers (bench --help)", add_help=False)
    return parser


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named options that were given."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return given(arguments, [*(name for name, _, _ in ENGINE_OPTIONS), "prefix_caching"])


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [*(name for name, _, _ in SAMPLING_OPTIONS), "stop", "stop_token_ids", "ignore_eos"]
    return {"max_tokens": MAX_NEW_TOKENS, **given(arguments, names)}


def run_generate(arguments: argparse.Namespace) -> int:
    if arguments.stream and len(arguments.prompts) > 1:
        raise CommandError("--stream takes one prompt")
    if arguments.stream and getattr(arguments, "n", 1) != 1:
        raise CommandError("--stream shows one output: leave --n out")
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in arguments.prompts]
    from minillm import LLM, SamplingParams

    params = SamplingParams(**sampling_options(arguments))
    with LLM(arguments.model, **engine_options(arguments)) as llm:
        if arguments.stream:
            pieces = llm.stream(
                prompts[0], params
            )  # a prompt that cannot be served is refused before anything is shown
            print("" if arguments.no_echo else prompts[0], end="", flush=True)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except RuntimeError as error:
                raise CommandError(f"the request failed: {one_line(error)}") from error
            finally:
                print()
            return EXIT_OK
        outputs = llm.generate(prompts, params, progress=sys.stderr.isatty())
    texts = [prompt for prompt in prompts for _ in range(params.n)]
    for index, (prompt, output) in enumerate(zip(texts, outputs, strict=True)):
        if index:
            print("\n" + "-" * 40)
        print(("" if arguments.no_echo else prompt) + output.text)
    return report_failures(outputs)


def report_failures(outputs: Sequence[RequestOutput]) -> int:
    """A line on stderr for each output that ended with `error`; the exit code."""
    failed = [output for output in outputs if output.finish_reason == "error"]
    for output in failed:
        print(f"minillm: error: {output.request_id} failed: {output.error}", file=sys.stderr)
    return EXIT_USAGE if failed else EXIT_OK


def run_demo(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.stories <= 26:
        raise CommandError("--stories must be 1 to 26")
    if arguments.every < 1:
        raise CommandError("--every must be at least 1")
    from minillm.cli_demo import tell_stories

    color = sys.stdout.isatty() and not arguments.no_color and not os.environ.get("NO_COLOR")
    outputs = tell_stories(
        arguments.model,
        engine_options(arguments),
        given(arguments, ("max_tokens", "temperature", "seed")),
        num_stories=arguments.stories,
        every=arguments.every,
        color=color,
    )
    return report_failures(outputs)


def run_doctor(arguments: argparse.Namespace) -> int:
    from minillm import doctor

    basics = doctor.run_checks(doctor.EVERYTHING)
    works = all(check.ok for check in basics)
    if works:
        basics.append(check_cpu_path())
        works = basics[-1].ok
    gpu = doctor.run_checks(doctor.GPU)
    gpu_works = all(check.ok for check in gpu)
    wants_gpu = arguments.gpu or doctor.has_nvidia_driver() or gpu[0].ok

    print("What everything needs")
    print_checks(basics, advise=True)
    print("\nWhat an NVIDIA GPU needs (optional)")
    print_checks(gpu, advise=wants_gpu)
    print()
    if not works:
        print("minillm does not run here yet: see the lines marked -> above.")
    else:
        print("The CPU path works: LLM() runs here.")
    if gpu_works:
        print("The GPU path is ready: the first run compiles FlashInfer's kernels, which takes minutes, once.")
    elif wants_gpu:
        print("FlashInfer cannot run here yet: see the lines marked -> above.")
    else:
        print("There is no NVIDIA GPU here, so nothing of the second list needs doing.")
    return EXIT_OK if works and (gpu_works or not arguments.gpu) else EXIT_FAILED


def print_checks(checks: Sequence[Check], advise: bool) -> None:
    for check in checks:
        print(f"  {'ok' if check.ok else '--'}  {check.name:<13} {check.detail}")
        if advise and not check.ok:
            print(f"      -> {check.advice}")


def check_cpu_path() -> Check:
    """Whether the bundled model says something on the CPU: the one proof that counts."""
    from minillm.doctor import Check

    try:
        from minillm import LLM, SamplingParams

        with LLM(device="cpu", num_pages=8) as llm:
            output = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=4))[0]
    except Exception as error:
        return Check("a first story", False, one_line(error), "install minillm again, in a new environment")
    return Check("a first story", bool(output.token_ids), f'"Once upon a time{output.text} ..."')


def run_bench(arguments: list[str]) -> int:
    """`bench` reads its own arguments."""
    from minillm.lab import bench

    return bench.main(arguments) or EXIT_OK


class CommandError(MiniLLMError, ValueError):
    """Arguments that make no sense together, or a request that failed."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 (doctor: something is missing), 2 (an error), 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["bench"]:
            return run_bench(words[1:])
        parser = make_parser()
        parsed = parser.parse_args(words)
        if parsed.command is None:
            parser.print_help()
            return EXIT_USAGE
        return parsed.run(parsed)
    except SystemExit as exit:  # argparse has said what there was to say
        return exit.code if isinstance(exit.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        print("\nminillm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has gone (`| head`): nobody is left to complain to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (MiniLLMError, OSError, ImportError, MemoryError) as error:
        print(f"minillm: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
