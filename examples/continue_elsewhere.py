"""Write a story in parts: each run continues the stream of the last one, in a new process."""

import json
from pathlib import Path

from kvmesh.client import Client

SAVED = Path("story.json")
DELTAS_PER_RUN = 20


def main() -> None:
    with Client() as client:
        if SAVED.exists():
            stream = client.resume(json.loads(SAVED.read_text("utf-8")))
        else:
            stream = client.generate_stream("Once upon a time", max_tokens=200)
        with stream:
            for _ in range(DELTAS_PER_RUN):
                if (delta := next(stream, None)) is None:
                    break
                print(delta.text, end="", flush=True)
    if stream.usage is None:
        SAVED.write_text(json.dumps(stream.cursor), "utf-8")
        print("\n(run it again to continue)")
    else:
        SAVED.unlink(missing_ok=True)
        print(f"\n{stream.usage.completion_tokens} tokens in all")


if __name__ == "__main__":
    main()
