"""Flask-HTTPAuth: `HTTPTokenAuth` with a `verify_token` that looks a SHA-256 up with SQLAlchemy."""

import hashlib
import os
import secrets

from flask import Flask
from flask_httpauth import HTTPTokenAuth
from sqlalchemy import String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

engine = create_engine(f"sqlite:///{os.environ['PEER_FOLDER']}/flask_httpauth.db")
Session = sessionmaker(engine)


class Base(DeclarativeBase):
    pass


class Key(Base):
    __tablename__ = "keys"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str]


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


app = Flask(__name__)
auth = HTTPTokenAuth()


@auth.verify_token
def verify_token(token: str) -> str | None:
    """Whose key it is."""
    with Session() as session:
        return session.scalar(select(Key.owner).where(Key.digest == digest_of(token)))


@app.get("/open")
def open_() -> str:
    return "hello"


@app.get("/protected")
@auth.login_required
def protected() -> str:
    return "hello"


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    token = secrets.token_urlsafe(32)
    with Session.begin() as session:
        session.add(Key(digest=digest_of(token), owner="me"))
    print(token)
