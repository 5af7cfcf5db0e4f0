"""An adapter is loaded, replaced and removed under twenty clients."""

import pytest
from support.vllm_server import vllm_server
from support.vllm_stress import CONTENTS, STEADY, Stress, options_of, save_contents

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_every_answer_is_of_a_content_that_the_adapter_had(tmp_path):
    served = save_contents(tmp_path)
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with vllm_server(served.base, tmp_path / "log", options_of(served), variables) as server:
        stress = Stress(server, served, tmp_path / "changed")
        stress.run(rounds=12, clients=20)
    found = [stress.content_of(*rest) for _, *rest in stress.asked]
    assert [request for request, content in zip(stress.asked, found) if content is None] == []
    assert {*found} >= {"base", *STEADY, *CONTENTS} and len(stress.changes) == 4
