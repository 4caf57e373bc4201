"""Ask what a long prompt would need before sending megabytes of it."""

from kvmesh.client import Client


def main() -> None:
    with Client() as client:
        for prompt_tokens in (1_000, 7_000, 1_000_000):
            estimate = client.estimate(prompt_tokens=prompt_tokens, max_tokens=256)
            verdict = "fits now" if estimate.feasible_now else "would have to wait"
            if not estimate.feasible_ever:
                verdict = "never fits"
            print(f"{prompt_tokens} prompt tokens: {verdict}")
            for group in estimate.groups:
                print(
                    f"  {group.group} ({group.kv_format}): needs {group.needed_bytes} B of "
                    f"{group.capacity_bytes} B; {group.reason}"
                )


if __name__ == "__main__":
    main()
