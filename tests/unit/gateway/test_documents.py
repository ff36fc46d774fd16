"""Documents in requests: what takes their place, what is kept, who waits for whom, and whose fault it is."""

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.config import Limits
from keepwarm.core.document import document_text
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import ChatRequest, DocumentPart, Mark, Message, Part, TextPart
from keepwarm.documents import DocumentFault, Order
from keepwarm.gateway.documents import Documents, TextCache
from keepwarm.gateway.reading import Places, Reading
from tests.files import pdf

pytestmark = pytest.mark.anyio


class Reader:
    """Reads a document as its bytes twice, and notes which it was asked for; waits for `gate` where there is one."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.read: list[bytes] = []
        self.gate = gate
        self.n_running = self.n_running_max = 0
        self.fault: Exception | None = None

    async def __call__(self, order: Order, data: bytes, s_max: float, environment: Mapping[str, str]) -> str:
        self.read.append(data)
        self.n_running += 1
        self.n_running_max = max(self.n_running_max, self.n_running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.fault is not None:
                raise self.fault
            return data.decode() * 2
        finally:
            self.n_running -= 1


def within(limits: Limits, reader: Reader) -> Documents:
    return Documents(limits, Reading(limits, reader))


def document(data: bytes = b"ab", media_type: str = "text/plain", **members: object) -> DocumentPart:
    return DocumentPart(media_type, data, "messages[0].content[1]", **members)  # type: ignore[arg-type]


def asking(*parts: Part) -> ChatRequest:
    return ChatRequest("m", (Message("user", parts),))


async def test_a_request_without_documents_is_itself():
    request = asking(TextPart("a"))
    assert await Documents(reading=Reading(extract_text=Reader())).read(request) is request


async def test_a_text_part_takes_the_place_of_each_document():
    mark = Mark(300)
    read = await Documents(reading=Reading(extract_text=Reader())).read(
        ChatRequest(
            "m",
            (
                Message("system", (TextPart("s"),)),
                Message("user", (TextPart("a"), document(title="T", context="C", mark=mark), TextPart("b")), name="n"),
                Message("assistant", (TextPart("c"),)),
                Message("user", (document(b"cd"), document(b"ef"))),
            ),
        )
    )
    assert [message.parts for message in read.messages] == [
        (TextPart("s"),),
        (TextPart("a"), TextPart(document_text("T", "C", "abab"), mark), TextPart("b")),
        (TextPart("c"),),
        (TextPart(document_text(None, None, "cdcd")), TextPart(document_text(None, None, "efef"))),
    ]
    assert read.messages[1].name == "n"


async def test_a_document_is_read_once_whatever_it_is_called():
    reader = Reader()
    documents = Documents(reading=Reading(extract_text=reader))
    first = await documents.read(asking(document(title="one")))
    again = await documents.read(asking(document(title="one"), document(title="two")))
    assert reader.read == [b"ab"]
    assert again.messages[0].parts[0] == first.messages[0].parts[0]


async def test_type_charset_and_tenant_make_it_another():
    reader = Reader()
    documents = Documents(reading=Reading(extract_text=reader))
    for media_type in ("text/plain", "text/plain; charset=latin-1", "text/html", "text/html"):
        await documents.read(asking(document(media_type=media_type)))
    assert len(reader.read) == 3
    await documents.read(asking(document()), "another tenant")
    assert len(reader.read) == 4


async def test_the_cache_has_a_bound():
    reader = Reader()
    documents = within(Limits(document_cache_bytes=10), reader)
    await documents.read(asking(document()))
    await documents.read(asking(document()))
    assert len(reader.read) == 2


async def test_those_who_ask_for_the_same_document_at_once_have_it_read_once():
    reader = Reader(asyncio.Event())
    documents = Documents(reading=Reading(extract_text=reader))
    async with asyncio.TaskGroup() as tasks:
        readings = [tasks.create_task(documents.read(asking(document()))) for _ in range(5)]
        await settled()
        assert reader.read == [b"ab"]
        reader.gate.set()
    assert reader.read == [b"ab"]
    assert len({reading.result().messages for reading in readings}) == 1


async def test_when_the_one_who_reads_is_cancelled_the_next_reads():
    reader = Reader(asyncio.Event())
    documents = Documents(reading=Reading(extract_text=reader))
    async with asyncio.TaskGroup() as tasks:
        first, second = (tasks.create_task(documents.read(asking(document()))) for _ in range(2))
        await settled()
        first.cancel()
        await settled()
        assert first.cancelled() and reader.read == [b"ab", b"ab"] and reader.n_running == 1
        reader.gate.set()
    assert second.result().messages[0].text == document_text(None, None, "abab")


async def test_no_more_are_read_at_once_than_allowed_and_a_cancelled_wait_takes_no_place():
    reader = Reader(asyncio.Event())
    documents = within(Limits(documents_at_once_max=2), reader)
    async with asyncio.TaskGroup() as tasks:
        readings = [tasks.create_task(documents.read(asking(document(b"%d" % n)), str(n))) for n in range(6)]
        await settled()
        assert reader.n_running == 2
        readings[1].cancel()
        readings[4].cancel()
        await settled()
        assert reader.n_running == 2
        reader.gate.set()
    assert reader.n_running_max == 2 and reader.n_running == 0
    assert sorted(reader.read) == [b"0", b"1", b"2", b"3", b"5"]


async def test_one_place_is_left_to_the_other_tenants():
    reader = Reader(asyncio.Event())
    documents = within(Limits(documents_at_once_max=3), reader)
    async with asyncio.TaskGroup() as tasks:
        for n in range(4):
            tasks.create_task(documents.read(asking(document(b"a%d" % n)), "a"))
        await settled()
        assert reader.read == [b"a0", b"a1"]
        tasks.create_task(documents.read(asking(document(b"b")), "b"))
        await settled()
        assert reader.read == [b"a0", b"a1", b"b"]
        reader.gate.set()
    assert reader.n_running_max == 3


async def test_one_place_in_all_goes_from_tenant_to_tenant():
    reader = Reader()
    documents = within(Limits(documents_at_once_max=1), reader)
    async with asyncio.TaskGroup() as tasks:
        for n in range(6):
            tasks.create_task(documents.read(asking(document(b"%d" % n)), f"tenant {n % 2}"))
    assert len(reader.read) == 6 and reader.n_running_max == 1


async def test_places_are_kept_only_while_somebody_uses_them():
    places = Places[str](2)
    async with places.one("a"), places.one("a"), places.one("b"):
        waiting = asyncio.ensure_future(take(places, "a"))
        await settled()
        assert len(places) == 2 and not waiting.done()
        waiting.cancel()
        await settled()
        assert len(places) == 2
    assert len(places) == 0
    await take(places, "a")
    assert len(places) == 0


async def test_one_request_reads_one_document_at_a_time():
    reader = Reader(asyncio.Event())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(Documents(reading=Reading(extract_text=reader)).read(asking(document(b"a"), document(b"b"))))
        await settled()
        assert reader.read == [b"a"]
        reader.gate.set()
    assert reader.read == [b"a", b"b"]


async def test_a_document_that_cannot_be_read_is_an_error_at_its_place():
    reader = Reader()
    documents = Documents(reading=Reading(extract_text=reader))
    reader.fault = DocumentFault("is encrypted")
    with pytest.raises(ApiError) as raised:
        await documents.read(asking(TextPart("a"), document()))
    assert (raised.value.kind, raised.value.param) == (ErrorKind.INVALID_REQUEST, "messages[0].content[1]")
    assert raised.value.message == "the document is encrypted"
    reader.fault = None
    await documents.read(asking(document()))  # nothing is remembered of it, and nothing is held


async def test_a_reader_that_breaks_is_no_fault_of_the_document():
    reader = Reader()
    reader.fault = OSError("no more processes")
    with pytest.raises(OSError, match="no more processes"):
        await Documents(reading=Reading(extract_text=reader)).read(asking(document()))


async def test_types_and_sizes_are_refused_before_anything_is_read():
    reader = Reader()
    documents = within(Limits(document_bytes_max=1000), reader)
    with pytest.raises(ApiError, match=r"the document is of the media type image/png, which is not read here"):
        await documents.read(asking(document(media_type="image/png")))
    with pytest.raises(ApiError, match=r"the document has 1,001 bytes, limit 1,000 \(document_bytes_max\)"):
        await documents.read(asking(document(b"x" * 1001)))
    assert reader.read == []


async def test_the_documents_of_a_request_have_one_limit_together():
    documents = within(Limits(document_chars_max=10), Reader())
    await documents.read(asking(document(), document()))
    with pytest.raises(ApiError, match=r"up to this one have 12 characters of text, limit 10 \(document_chars_max\)"):
        await documents.read(asking(*[document()] * 1000))


async def test_a_document_is_read_for_real():
    read = await Documents().read(asking(document(pdf([["Hello"]]), "application/pdf", title="T")))
    assert read.messages[0].text == document_text("T", None, "Hello")
    with pytest.raises(ApiError, match="the document cannot be read as PDF"):
        await Documents().read(asking(document(b"%PDF-1.7 rubbish", "application/pdf")))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=40))
def test_the_cache_keeps_what_was_used_last_within_its_bytes(uses: list[tuple[int, int]]):
    cache = TextCache(3000)
    model: dict[bytes, str] = {}  # in the order of use
    for number, n_chars in uses:
        key = b"%d" % number
        found = cache.get(key)
        assert found == model.get(key)
        if found is None:
            found = "x" * n_chars
            cache.put(key, found)
        model.pop(key, None)
        model[key] = found
        while sum(len(text) + 49 + 256 for text in model.values()) > 3000:
            del model[next(iter(model))]
        assert len(cache) == len(model) and cache.n_bytes <= cache.bytes_max
    assert cache.n_bytes == sum(len(text) + 49 + 256 for text in model.values())


async def take(places: Places[str], key: str) -> None:
    async with places.one(key):
        pass


async def settled() -> None:
    """Everything that can go on without the gate has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)
