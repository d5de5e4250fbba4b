"""A terminal chat with a local model and its δ-mem adapter; the memory outlives context and process.

    python examples/chat.py --model DIR --adapter DIR          a transformers checkpoint and an adapter for it
    python examples/chat.py --random                           without files: a tiny untrained model that talks bytes

A line is a message, or a command:
    /memory          norm of each layer's state
    /forget          drop the context (KV cache), keep the memory
    /clear           empty the memory, keep the context
    /undo            roll the last turn back
    /save [FOLDER]   write the session (default: the --session folder)
    /load [FOLDER]   continue a saved one
    /help, /quit
"""

import argparse
import sys
import time

from tqdm import tqdm

BAR = 40  # characters of the longest bar of /memory


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a transformers checkpoint")
    parser.add_argument("--adapter", help="folder of its adapter")
    parser.add_argument("--random", action="store_true", help="a tiny model of random weights instead")
    parser.add_argument("--session", default="session", help="folder of /save and /load; loaded first where it exists")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto (as the checkpoint), float32 or bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.random and not (options.model and options.adapter):
        parser.error("--model and --adapter must both be given, or --random")
    return options


def load_model(options):
    """-> model with its memory, tokenizer"""
    import torch
    import transformers

    from deltamem_kernels import hf

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.random:
        model, tokenizer = random_model()
        return model.to(device), tokenizer
    with tqdm(total=3, desc="tokenizer", leave=False) as bar:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        bar.update()
        bar.set_description("model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, local_files_only=True, dtype=options.dtype
        )
        model = model.to(device).eval()
        bar.update()
        bar.set_description("adapter")
        hf.load_adapter(model, options.adapter)
        bar.update()
    return model, tokenizer


def random_model():
    """Bytes in, bytes out; 256 ends a reply."""
    import torch
    import transformers

    from deltamem_kernels import hf

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, eos_token_id=256, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    hf.attach(model, hf.DeltaMemConfig(output_init="random", online_gain=1.0))

    def decode(ids):
        return bytes(x for x in ids if x < 256).decode(errors="replace")

    return model, (lambda text: list(text.encode()), decode)


class Chat:
    def __init__(self, session, model, tokenizer, options):
        self.session, self.model, self.tokenizer, self.options = session, model, tokenizer, options

    def say(self, line: str) -> None:
        options, times = self.options, []
        bar = tqdm(desc="prefill", unit=" tokens", leave=False, delay=0.5)

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                times.append(time.perf_counter())
                bar.close()

        turn = self.session.stream_text(
            line, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, progress=progress,
        )  # fmt: skip
        before, begin = len(self.session.tokens), time.perf_counter()
        try:
            for piece in turn:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            turn.close()
            print(" (interrupted)", end="")
        finally:
            bar.close()
        print()
        entered = len(self.session.tokens) - before
        if not entered:  # interrupted inside a forward
            print("[turn rolled back]")
            return
        message = bar.total
        reply, decode = entered - message, time.perf_counter() - times[0]
        rate = f"{(reply - 1) / decode:,.1f}" if reply > 1 else "-"  # the first one came out of the prefill
        print(
            f"[{message} tokens entered in {times[0] - begin:.2f} s · {reply} came at {rate} tokens/s · "
            f"context {self.session.context_length}]"
        )

    def command(self, line: str) -> bool:
        """-> whether the chat goes on"""
        from deltamem_kernels import hf

        name, _, folder = line[1:].partition(" ")
        folder = folder.strip() or self.options.session
        session = self.session
        if name == "quit":
            return False
        if name == "help":
            print(__doc__.partition("command:\n")[2], end="")
        elif name == "memory":
            self.show_memory()
        elif name == "forget":
            session.forget_context()
            print("[context dropped, memory kept]")
        elif name == "clear":
            session.clear_memory()
            print("[memory empty, context kept]")
        elif name == "undo":
            session.undo()
            print(f"[turn rolled back · context {session.context_length}]")
        elif name == "save":
            session.save(folder)
            print(f"[saved to {folder}]")
        elif name == "load":
            self.session = hf.DeltaMemSession.load(folder, self.model, self.tokenizer)
            print(f"[{len(self.session.tokens)} tokens from {folder}, {self.session.context_length} in the context]")
        else:
            print(f"[no command /{name}; /help lists them]")
        return True

    def show_memory(self) -> None:
        norms = self.session.memory_norms()
        largest = max(norms) or 1.0
        for i, norm in enumerate(norms):
            print(f"layer {i:3}  {norm:9.4f}  {'█' * round(BAR * norm / largest)}")


def lines():
    """Lines of the terminal with a prompt, of a file or pipe without."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main() -> int:
    options = arguments()
    model, tokenizer = load_model(options)
    from pathlib import Path

    from deltamem_kernels import hf

    chat = Chat(hf.DeltaMemSession(model, tokenizer, seed=options.seed), model, tokenizer, options)
    try:
        if (Path(options.session) / "session.json").exists():
            chat.command("/load")
        print("A line is a message, /help lists commands.")
        for line in lines():
            line = line.strip()
            if not line:
                continue
            try:
                if not line.startswith("/"):
                    chat.say(line)
                elif not chat.command(line):
                    break
            except (ValueError, OSError) as error:
                print(f"[{error}]")
    except ValueError as error:  # the folder holds another model's session
        print(f"[{error}]", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
