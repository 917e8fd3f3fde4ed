"""The trained models that ship with moesim, and short texts of our own to check them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from moesim.errors import UsageError
from moesim.traces.demo_pairs import sentences

FOLDER: Final = Path(__file__).parent / "models"

CHECK_TEXTS: Final = {
    "english": (
        "The server keeps a list of open connections. When a client closes its connection, the"
        " entry is removed from the list and the memory is returned to the system. If the option"
        " is not set, the default value is used. See the next section for a description of the"
        " other options and their values."
    ),
    "german": (
        "Das Programm liest die Datei und gibt den Inhalt auf der Standardausgabe aus. Wenn keine"
        " Datei angegeben ist, wird die Standardeingabe gelesen. Die Option bestimmt, wie viele"
        " Zeilen angezeigt werden. Bei Erfolg wird 0 zurückgegeben, sonst ein Fehlerwert."
    ),
    "code": (
        "def shortest(graph, source, target):\n"
        '    """Returns the nodes on a shortest path from source to target."""\n'
        "    if source not in graph:\n"
        '        raise ValueError("The source node is not in the graph")\n'
        "    seen = {source: None}\n"
        "    queue = [source]\n"
        "    for node in queue:\n"
        "        for other in graph[node]:\n"
        "            if other not in seen:\n"
        "                seen[other] = node\n"
        "                queue.append(other)\n"
        "    return seen\n"
    ),
    "russian": (
        "Программа читает файл и выводит его содержимое на стандартный вывод. Если файл не указан,"
        " используется стандартный ввод. Параметр задаёт количество строк, которые будут показаны."
        " При успешном выполнении возвращается 0, при ошибке возвращается другое значение."
    ),
}
"""Written for this project, so that a model's stated losses can be checked anywhere."""


def shipped() -> list[str]:
    """Names of the models whose weights are here."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model.safetensors"))


def model_path(name_or_path: str) -> Path:
    """The folder of a shipped model, or the path itself.

    Raises
    ------
    UsageError
        If there is no such folder.
    """
    if (FOLDER / name_or_path / "model.safetensors").exists():
        return FOLDER / name_or_path
    path = Path(name_or_path)
    if not path.is_dir():
        raise UsageError(
            f"{path}: no such folder; name a model's folder or a shipped one"
            f" ({', '.join(shipped())})"
        )
    return path


def check_losses(model: Any, tokenizer: Any) -> dict[str, float]:
    """The model's loss on each of `CHECK_TEXTS`, nats a token.

    An encoder-decoder reads the text, a sentence a line, and is asked for the first of them.
    """
    import torch

    model.eval()
    out = {}
    for name, text in CHECK_TEXTS.items():
        read = asked = text
        if model.config.is_encoder_decoder:
            lines = sentences(text, by_line=name == "code")
            read, asked = "\n".join(lines), lines[0]
        ids, labels = (tokenizer(one, return_tensors="pt")["input_ids"] for one in (read, asked))
        if model.config.is_encoder_decoder:
            labels = labels[:, 1:]
        with torch.no_grad():
            out[name] = float(model(input_ids=ids, labels=labels).loss)
    return out
