"""The formats `int8` and `int4`: asymmetric, one scale and minimum per token and head."""
