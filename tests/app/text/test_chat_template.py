import pytest

from app.text import ChatTemplate, ChatTemplateError, ModelText

USER = [{"role": "user", "content": "Hi"}]


def test_the_default_models_prompt(text: ModelText) -> None:
    assert text.chat_template is not None
    assert text.chat_template.render(USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *USER]
    assert text.chat_template.render(own, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_what_published_templates_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{{ m.content | trim }}{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{{ enable_thinking }}"
    )
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    messages = [{"role": "tool", "content": "no"}, {"role": "user", "content": " é "}]
    assert (
        template.render(messages, tools=[{"n": "é<"}], enable_thinking=False) == '<s>é[{"n": "é<"}]</s>4False'
    )


def test_blocks_leave_no_line_of_their_own() -> None:
    template = ChatTemplate(
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    )
    assert template.render(USER) == "Hi\n"


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="refuses these messages: Roles must alternate"):
        template.render(USER)


def test_faults_are_named() -> None:
    with pytest.raises(ChatTemplateError, match="faulty at line 2"):
        ChatTemplate("\n{% for %}")
    with pytest.raises(ChatTemplateError, match="cannot take"):
        ChatTemplate("{{ messages[0]['content'] + 1 }}").render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    messages = list(USER)
    try:
        rendered = ChatTemplate(source).render(messages)
    except ChatTemplateError:
        rendered = ""
    assert rendered == ""
    assert messages == USER
