"""The Modelfile: its template renders as the chat template does, or there is none and the reason is said."""

import json
import shutil
import subprocess

import pytest
from cli.test_export import base_of
from support.go_template import render
from train.tiny import sums, tiny_tokenizer, write_jsonl

from s2ft.cli.main import main
from s2ft.export.ollama import modelfile
from s2ft.text.prompts import prompt_format

TURNS = [
    ("user", "Is 2 + 3 = 5?"),
    ("assistant", "Yes.\n\nBoth sides are 5."),
    ("user", "And {{ 2 }} × 3?"),
    ("assistant", "<b>6</b>"),
    ("user", "Thanks"),
]
FIRST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHAT,
    "a default system prompt": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}" + CHAT,
    "llama 3": "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma, the system prompt in the first turn": FIRST_SYSTEM
    + "{{ bos_token }}{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' "
    "+ (system + '\n\n' if system and loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral, the system prompt in the last turn": FIRST_SYSTEM
    + "{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if system and "
    "loop.last else '') + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}",
    "no system prompt": REFUSES + "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}",
    "alpaca": prompt_format(tiny_tokenizer(), chat_template="alpaca").template,
}


def cases_of(name):
    """Each conversation with what the chat template makes of it, and the data of Ollama for it."""
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    for system in ("", "Answer briefly."):
        for length in (1, 3, 5):
            turns = [("system", system)] * bool(system) + TURNS[:length]
            messages = [{"role": role, "content": content} for role, content in turns]
            if not (system and TEMPLATES[name].startswith(REFUSES)):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                listed = [{"Role": role, "Content": content} for role, content in turns]
                yield text, {"System": system, "Messages": listed}


def template_of(name):
    text, note = modelfile(tiny_tokenizer(TEMPLATES[name]), 256)
    assert note == "a Modelfile whose template renders as the chat template"
    return text.split('"""')[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_renders_as_the_chat_template(name):
    template = template_of(name)
    cases = list(cases_of(name))
    assert len(cases) == (3 if name == "no system prompt" else 6)
    for expected, data in cases:
        assert render(template, data) == expected


PROGRAM = """
package main
import ("encoding/json"; "os"; "strings"; "text/template")
func main() {
	var cases []struct { Template string; Data struct { System string; Messages []*struct{ Role, Content string } } }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	for _, c := range cases {
		var b strings.Builder
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&b, c.Data); err != nil { panic(err) }
		texts = append(texts, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_go_renders_the_templates_too(tmp_path):
    (tmp_path / "main.go").write_text(PROGRAM)
    cases = [(template_of(name), *case) for name in TEMPLATES for case in cases_of(name)]
    sent = json.dumps([{"Template": template, "Data": data} for template, _, data in cases])
    command = ["go", "run", str(tmp_path / "main.go")]
    ended = subprocess.run(command, input=sent, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [expected for _, expected, _ in cases]


@pytest.mark.parametrize(
    "template,reason",
    (
        ("{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}", "the text of the user is changed"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}", "renders 5 messages"),
        ("{{ raise_exception('not today') }}", "refuses a test conversation (not today)"),
        (None, "the tokenizer has no chat template"),
    ),
)
def test_a_template_that_can_not_be_written_is_left_out_with_the_reason(template, reason):
    text, note = modelfile(tiny_tokenizer(template), 256, stops=[2])
    assert note.startswith("no TEMPLATE") and reason in note and f"# {note}" in text
    assert 'TEMPLATE "' not in text and text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 256\n')


def test_plain_text_has_no_turns_and_a_system_prompt_is_quoted():
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(tiny_tokenizer(), 256, plain=True)[0]
    assert 'SYSTEM """Be "brief"."""' in modelfile(tiny_tokenizer(), 256, system='Be "brief".')[0]
    with pytest.raises(ValueError, match="which a Modelfile can't hold"):
        modelfile(tiny_tokenizer(), 256, system='"""')


def test_the_command(tmp_path, capsys):
    base_of(tmp_path / "model", pre="llama-bpe")
    data = write_jsonl(tmp_path / "data.jsonl", sums(8))
    train = ["--model", tmp_path / "model", "--data", data, "--output", tmp_path / "run", "--max-steps", 1]
    train += ["--batch-size", 4, "--save-steps", 0, "--system-prompt", "Be brief."]
    assert main([str(word) for word in ("sft", *train)]) == 0
    export = [tmp_path / "run", "--model", tmp_path / "model", "--format", "ollama", "--output", tmp_path / "out"]
    assert main([str(word) for word in ("export", *export, "--quantization", "q8_0", "--num-ctx", 128)]) == 0
    assert "Q8_0, written by s2ft" in capsys.readouterr().out
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """') and text.endswith("PARAMETER num_ctx 128\n")
    assert 'SYSTEM """Be brief."""' in text and (tmp_path / "out/model.gguf").is_file()
