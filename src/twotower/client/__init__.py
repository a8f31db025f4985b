"""Call a server over HTTP.

with Client("http://127.0.0.1:8000") as client:
    client.recommend(user="u_17", k=5, filter="price <= 2")["items"]
    client.add_event("u_17", "b_230", stars=5)
"""

from twotower.client.client import Client
from twotower.client.types import EventIn, RecommendIn

__all__ = ["Client", "EventIn", "RecommendIn"]
