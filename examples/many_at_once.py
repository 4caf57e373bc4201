"""Send many requests at once: those that do not fit wait, and each reports its waiting time."""

import asyncio

from kvmesh.client import AsyncClient, Completion

TOPICS = ("rivers", "clocks", "bread", "maps", "bridges", "winter", "salt", "lighthouses")


async def main() -> None:
    async with AsyncClient() as client:

        async def write(topic: str) -> Completion:
            return await client.generate(f"A short poem about {topic}:\n", max_tokens=40, seed=7)

        poems = await asyncio.gather(*(write(topic) for topic in TOPICS))
    for topic, poem in zip(TOPICS, poems, strict=True):
        first_line = poem.choices[0].text.strip().partition("\n")[0]
        print(f"{topic:12} waited {poem.usage.queue_s:5.2f} s  {first_line}")


if __name__ == "__main__":
    asyncio.run(main())
