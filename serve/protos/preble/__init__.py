"""Protobuf and gRPC code of the wire format; made from the .proto files by scripts/generate_protos.py."""
