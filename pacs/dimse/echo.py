"""Verification (PS3.4 Annex A)."""

from __future__ import annotations

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Message
from pacs.dimse.status import Status


def answer_echo(association: Association, message: Message) -> None:
    """Answer C-ECHO-RQ; anybody who may associate may ask."""
    association.send(message.context_id, cmd.response(message.command, Status.SUCCESS))
