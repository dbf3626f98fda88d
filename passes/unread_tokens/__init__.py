"""Unread tokens: after the last attention, only the tokens that the head reads are computed."""

from mpcompile.passes.unread_tokens.drop_unread_tokens import DropUnreadTokens

__all__ = ["DropUnreadTokens"]
