"""Stream an answer, then show what it cost. Start `kvmesh serve` first."""

from kvmesh.client import Client, Message


def main() -> None:
    with (
        Client() as client,
        client.chat_stream(
            [Message("user", "Name three uses of a paperclip.")], max_tokens=80, temperature=0.0
        ) as stream,
    ):
        for delta in stream:
            print(delta.text, end="", flush=True)
    usage = stream.usage
    assert usage is not None, "the stream has ended"
    print(f"\n{usage.completion_tokens} tokens, {usage.kv_used_bytes} B of KV cache, all freed")


if __name__ == "__main__":
    main()
