"""The recognizer's service for the shop's other programs: REST, gRPC, who may ask, and the page beside them."""
