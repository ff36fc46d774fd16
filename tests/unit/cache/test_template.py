import pytest

from keepwarm.cache.template import STEPS_MAX, ChatTemplate, Json
from keepwarm.core.errors import ApiError, ErrorKind

USER: list[Json] = [{"role": "user", "content": "hi"}]


def render(
    source: str, messages: list[Json] | None = None, tools: list[Json] | None = None, generate: bool = False
) -> str:
    template = ChatTemplate(source, bos="<s>", eos="</s>")
    return template.render(USER if messages is None else messages, tools, generate=generate, chars_in=2)


def refusal(source: str, messages: list[Json] | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        render(source, messages)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.param == "messages"
    return caught.value


def test_what_a_template_sees() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% endfor %}{{ eos_token }}{{ tools }}"
    )
    assert render(source) == "<s>user:hi</s>None"
    assert render("{{ add_generation_prompt }}", generate=True) == "True"


def test_blocks_leave_no_white_space() -> None:
    assert render("{% if true %}\n  {% if true %}\nx{% endif %}\n{% endif %}\ny") == "xy"


def test_break_and_continue() -> None:
    assert (
        render(
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        )
        == "02"
    )


def test_generation_blocks_are_their_content() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_tojson_keeps_characters() -> None:
    messages: list[Json] = [{"role": "user", "content": "<é & 'ü'>"}]
    assert render("{{ messages[0] | tojson }}", messages) == '{"role": "user", "content": "<é & \'ü\'>"}'
    assert render("{{ messages | tojson(indent=1) }}") == '[\n {\n  "role": "user",\n  "content": "hi"\n }\n]'


def test_a_refusal_is_the_clients_error_in_the_templates_words() -> None:
    assert "roles must alternate" in refusal("{{ raise_exception('roles must alternate') }}").message


@pytest.mark.parametrize("source", ["{{ nothing.at.all }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[7].role }}"])
def test_a_template_that_fails_is_no_crash(source: str) -> None:
    refusal(source)


def test_no_code_gets_out_of_the_sandbox() -> None:
    refusal("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    refusal("{{ messages.append(1) }}")


def test_there_is_no_clock_and_no_chance() -> None:
    assert render("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}fixed{% endif %}") == "fixed"
    assert render("{% if not strftime_now is defined %}fixed{% endif %}") == "fixed"
    assert render("today: {{ strftime_now('%d %b %Y') }}.") == "today: ."
    for chance in ("{{ [1, 2] | random }}", "{{ lipsum() }}"):
        with pytest.raises((ApiError, ValueError)):
            render(chance)


def test_output_is_bounded_by_input() -> None:
    message = refusal("{% for i in range(99999) %}{{ '0123456789012345678901234567890' }}{% endfor %}").message
    assert "2 characters became more than 1,048,592" in message


def test_steps_are_bounded() -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0] %}{% endfor %}{% endfor %}"
    assert f"{STEPS_MAX:,} steps" in refusal(loops).message
    refusal("{% for i in range(100001) %}{% endfor %}")


def test_what_is_no_template_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("fine\n{% for %}", bos="", eos="")
