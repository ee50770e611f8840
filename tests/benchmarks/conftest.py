import pytest


@pytest.fixture(scope="session")
def e2e(tmp_path_factory):
    """A folder in the format of the challenge: 20 meaning representations to train on, with two sentences each, and 3 to test on."""
    folder = tmp_path_factory.mktemp("e2e")
    for name, count in (("devset.csv", 20), ("testset_w_refs.csv", 3)):
        lines = ['"mr","ref"']
        for number in range(count):
            meaning = f"name[Cotto {number}], eatType[pub]"
            lines += [f'"{meaning}","Cotto {number} is a pub."', f'"{meaning}","A pub, ""Cotto {number}""."']
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
