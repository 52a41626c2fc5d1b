"""200 JSON schemas by feature, like those of JSON-Schema-Test-Suite; a short answer satisfies each.

Strings and arrays have limits, so that a small model comes to an end.
"""

from typing import Any

Schema = dict[str, Any]


def obj(properties: Schema, /, **keywords: Any) -> Schema:
    """A closed object with these properties, all required unless `required` says otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **keywords,
    }


def arr(items: Any, most: int = 3, /, **keywords: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": most, **keywords}


def text(most: int = 12, **keywords: Any) -> Schema:
    return {"type": "string", "maxLength": most, **keywords}


def whole(low: int = 0, high: int = 99) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def pattern(regex: str, **keywords: Any) -> Schema:
    return {"type": "string", "pattern": regex, **keywords}


YES: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
COLOR: Schema = {"enum": ["red", "green", "blue"]}
POINT = obj({"x": whole(), "y": whole()})
PERSON = obj({"name": text(16), "age": whole(0, 120)})

FEATURES: dict[str, list[Schema]] = {
    "types": [
        YES,
        NULL,
        whole(),
        text(),
        arr(YES),
        obj({}),
        obj({"is_open": YES}),
        obj({"nothing": NULL, "something": whole()}),
        obj({"title": text(20), "pages": whole(1, 900), "is_new": YES}),
        {"type": "object", "properties": {"a": whole()}, "required": ["a"], "maxProperties": 1},
    ],
    "nested": [
        obj({"a": obj({"b": obj({"c": obj({"d": whole()})})})}),
        obj({"from": POINT, "to": POINT}),
        obj({"owner": PERSON, "pets": arr(obj({"kind": COLOR, "name": text(8)}), 2)}),
        obj({"grid": arr(arr(whole(0, 9), 3), 3)}),
        arr(arr(arr(YES, 2), 2), 2),
        obj({"a": arr(obj({"b": arr(obj({"c": YES}), 2)}), 2)}),
        arr(PERSON, 2),
        obj({"outer": obj({"inner": arr(POINT, 2), "label": text(6)}), "id": whole(1, 9)}),
        obj({"order": obj({"lines": arr(obj({"sku": pattern("^[A-Z]{3}$"), "n": whole(1, 5)}), 2)})}),
        obj({"l": obj({"l": obj({"v": whole()}), "r": obj({"v": whole()})}), "r": obj({"v": whole()})}),
    ],
    "enum": [
        COLOR,
        {"enum": [1, 2, 3]},
        {"enum": [None, True, False]},
        {"enum": ["one", 2, 3.5, None, [1], {"a": 1}]},
        {"type": "string", "enum": ["a", "ab", "abc"]},
        {"type": "integer", "enum": [10, 20, 30]},
        obj({"size": {"enum": ["S", "M", "L", "XL"]}, "color": COLOR}),
        arr(COLOR, 4, minItems=2),
        obj({"level": {"enum": [0.5, 1.5, -2.25]}}),
        {"enum": [{"kind": "point", "at": [0, 0]}, {"kind": "line", "at": [1, 1]}]},
        {"type": ["string", "null"], "enum": ["yes", None]},
        obj({"status": {"enum": ["todo", "in progress", "done!"]}}),
    ],
    "const": [
        {"const": "fixed"},
        {"const": 42},
        {"const": None},
        {"const": {"a": [1, {"b": True}]}},
        {"const": []},
        {"const": -1.5},
        obj({"version": {"const": 2}, "kind": {"const": "cat"}, "lives": whole(1, 9)}),
        obj({"type": {"const": "object"}, "const": {"const": "const"}}),
    ],
    "pattern": [
        pattern("^[a-z]{3,8}$"),
        pattern("^[A-Z][a-z]{2,7}$"),
        pattern("^\\d{3}-\\d{4}$"),
        pattern("^(cat|dog|bird)s?$"),
        pattern("^#[0-9a-f]{6}$"),
        pattern('^[^"\\\\]{2,5}$'),
        pattern("^v\\d{1,2}\\.\\d{1,2}$"),
        pattern("^\\S{1,8}$"),
        pattern("^[A-Z]{2}\\d{2}( \\d{4}){2}$"),
        pattern("^(ab){1,3}c?$"),
        pattern("^a.c$"),
        pattern("^$"),
        obj({"plate": pattern("^[A-Z]{1,3}-[0-9]{1,4}$"), "zip": pattern("^[0-9]{5}$")}),
        arr(pattern("^[01]{4}$"), 3, minItems=1),
        pattern("^[a-c]+$", minLength=2, maxLength=6),
        pattern("b", maxLength=8),
    ],
    "format": [
        {"type": "string", "format": "date"},
        text(20, format="time"),
        {"type": "string", "format": "date-time"},
        text(12, format="duration"),
        {"type": "string", "format": "uuid"},
        {"type": "string", "format": "ipv4"},
        {"type": "string", "format": "ipv6"},
        text(20, format="email"),
        text(20, format="hostname"),
        obj({"born": {"type": "string", "format": "date"}, "name": text(10)}),
        obj({"id": {"type": "string", "format": "uuid"}, "host": {"type": "string", "format": "ipv4"}}),
        arr({"type": "string", "format": "date"}, 2, minItems=1),
    ],
    "string": [
        text(1),
        text(5, minLength=5),
        text(20, minLength=1),
        {"type": "string", "minLength": 3, "maxLength": 6},
        {"type": "string", "maxLength": 0},
        obj({"short": text(3), "long": text(30, minLength=10)}),
        arr(text(4, minLength=2), 3, minItems=1),
        obj({"quote": text(15, description='With "quotes", a \\ and a line break.')}),
    ],
    "integer": [
        whole(-5, 5),
        whole(1000, 2000),
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
        {"type": "integer", "minimum": -120, "maximum": -100},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        {"type": "integer", "minimum": 7, "maximum": 7},
        {"type": "integer", "minimum": 99, "maximum": 101},
        obj({"year": whole(1900, 2030), "month": whole(1, 12), "day": whole(1, 28)}),
        arr(whole(1, 6), 5, minItems=5),
        {"type": "integer", "minimum": 0.5, "maximum": 3.5},
        obj({"even": {"type": "integer", "multipleOf": 2, "minimum": 2, "maximum": 20}}),
        {"type": "integer", "minimum": -999999, "maximum": 999999},
    ],
    "number": [
        {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.5},
        obj({"price": {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 0.01}}),
        {"type": "number", "enum": [0.1, 1e3, -2.5e-3]},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 10, "multipleOf": 0.1},
        arr({"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 1}, 3, minItems=1),
        obj({"lat": {"type": "number", "minimum": -90, "maximum": 90, "multipleOf": 0.1}}),
        {"type": ["number", "null"], "minimum": 5, "maximum": 6, "multipleOf": 0.5},
    ],
    "array": [
        arr(whole(), 0),
        arr(whole(), 1),
        arr(whole(), 4, minItems=4),
        arr(text(5), 3, minItems=2),
        arr(YES, 5, minItems=3),
        {
            "type": "array",
            "maxItems": 2,
            "items": {"type": ["integer", "boolean"], "minimum": 0, "maximum": 9},
        },
        arr(obj({"id": whole(1, 9)}), 3, minItems=3),
        obj({"tags": arr(COLOR, 3), "scores": arr(whole(0, 10), 3, minItems=1)}),
        {"type": "array", "items": False},
        arr(NULL, 3, minItems=1),
    ],
    "prefixItems": [
        {"type": "array", "prefixItems": [whole(), text(5)], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [YES, YES], "items": whole(), "minItems": 2, "maxItems": 4},
        {
            "type": "array",
            "prefixItems": [{"const": "point"}, whole(), whole()],
            "items": False,
            "minItems": 3,
        },
        {"type": "array", "prefixItems": [whole()], "items": False},
        {
            "type": "array",
            "prefixItems": [COLOR, arr(whole(), 2)],
            "items": NULL,
            "minItems": 2,
            "maxItems": 3,
        },
        obj({"pair": {"type": "array", "prefixItems": [text(4), POINT], "items": False, "minItems": 2}}),
        {"type": "array", "prefixItems": [whole(), whole()], "maxItems": 2},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [whole(), YES],
            "additionalItems": False,
            "minItems": 2,
        },
    ],
    "$ref": [
        {
            "$defs": {"color": COLOR},
            **obj({"front": {"$ref": "#/$defs/color"}, "back": {"$ref": "#/$defs/color"}}),
        },
        {"$defs": {"point": POINT}, "type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
        {"definitions": {"n": whole(1, 3)}, **obj({"n": {"$ref": "#/definitions/n"}})},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": whole()}, "$ref": "#/$defs/a"},
        {"$defs": {"deep": {"$defs": {"x": COLOR}}}, **obj({"c": {"$ref": "#/$defs/deep/$defs/x"}})},
        obj({"first": PERSON, "second": {"$ref": "#/properties/first"}}),
        {
            "$defs": {"a/b": YES, "c~d": whole(0, 9)},
            **obj({"p": {"$ref": "#/$defs/a~1b"}, "q": {"$ref": "#/$defs/c~0d"}}),
        },
        {"$defs": {"é ü": COLOR}, **obj({"c": {"$ref": "#/$defs/%C3%A9%20%C3%BC"}})},
        {"$id": "https://example.org/root", "$defs": {"n": whole()}, **obj({"n": {"$ref": "#/$defs/n"}})},
        {"$defs": {"s": {"$anchor": "small", **text(4)}}, **obj({"s": {"$ref": "#/$defs/s"}})},
    ],
    "recursive": [
        obj({"v": whole(0, 9), "next": {"anyOf": [NULL, {"$ref": "#"}]}}),
        {
            "$defs": {"tree": obj({"n": whole(0, 9), "kids": arr({"$ref": "#/$defs/tree"}, 2)})},
            "$ref": "#/$defs/tree",
        },
        {"$defs": {"e": {"anyOf": [whole(0, 9), arr({"$ref": "#/$defs/e"}, 2)]}}, "$ref": "#/$defs/e"},
        obj({"name": text(6), "parent": {"anyOf": [NULL, {"$ref": "#"}]}}),
        {
            "$defs": {
                "a": obj({"b": {"anyOf": [NULL, {"$ref": "#/$defs/b"}]}}),
                "b": obj({"a": {"anyOf": [NULL, {"$ref": "#/$defs/a"}]}}),
            },
            "$ref": "#/$defs/a",
        },
        {
            "type": "object",
            "properties": {"leaf": YES, "child": {"$ref": "#"}},
            "required": ["leaf"],
            "additionalProperties": False,
        },
    ],
    "anyOf": [
        {"anyOf": [whole(), NULL]},
        {"anyOf": [text(6), arr(whole(), 2)]},
        obj({"id": {"anyOf": [whole(1, 9), pattern("^[a-z]{2}$")]}}),
        arr({"anyOf": [YES, whole(0, 9), text(3)]}, 4, minItems=1),
        {"anyOf": [obj({"a": whole()}), obj({"b": YES})]},
        {"anyOf": [whole(0, 5), whole(3, 9)]},
        obj({"a": {"anyOf": [{"const": 1}, {"const": "one"}]}, "b": {"anyOf": [NULL, COLOR]}}),
        {
            "type": "object",
            "properties": {"a": whole()},
            "anyOf": [{"required": ["a"]}],
            "additionalProperties": False,
        },
        {"anyOf": [POINT, arr(POINT, 2)]},
        obj({"when": {"anyOf": [{"type": "string", "format": "date"}, {"const": "never"}]}}),
    ],
    "oneOf": [
        {"oneOf": [whole(), text(5)]},
        {"oneOf": [NULL, YES, arr(YES, 2)]},
        {
            "oneOf": [
                obj({"kind": {"const": "circle"}, "r": whole()}),
                obj({"kind": {"const": "square"}, "a": whole()}),
            ]
        },
        obj({"shape": {"oneOf": [obj({"t": {"const": "a"}}), obj({"t": {"const": "b"}, "n": whole(0, 9)})]}}),
        arr(
            {"oneOf": [obj({"op": {"const": "add"}, "n": whole(0, 9)}), obj({"op": {"const": "del"}})]},
            3,
            minItems=1,
        ),
        {"oneOf": [{"enum": ["a", "b"]}, {"enum": [1, 2]}]},
        {"oneOf": [{"type": "integer", "minimum": 1, "maximum": 4}, {"type": "boolean"}]},
        obj({"v": {"oneOf": [{"const": "x"}, {"const": "y"}, {"const": 3}]}}),
    ],
    "allOf": [
        {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]},
        {"allOf": [text(6), {"minLength": 2}]},
        {
            "allOf": [
                {"type": "object", "properties": {"a": whole()}, "required": ["a"]},
                {"properties": {"a": {}, "b": YES}, "required": ["b"], "additionalProperties": False},
            ]
        },
        obj({"n": {"allOf": [whole(0, 50), {"multipleOf": 10}]}}),
        {
            "$defs": {"base": {"type": "integer", "minimum": 0}},
            "allOf": [{"$ref": "#/$defs/base"}, {"maximum": 20}],
        },
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
        {
            "allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}],
            "minimum": 0,
            "maximum": 9,
        },
        {"allOf": [{"type": "array", "items": whole(0, 9)}, {"minItems": 1}, {"maxItems": 3}]},
    ],
    "additionalProperties": [
        {"type": "object", "additionalProperties": whole(), "maxProperties": 2},
        {"type": "object", "additionalProperties": YES, "minProperties": 1, "maxProperties": 1},
        obj({"a": whole()}, additionalProperties={"type": "boolean"}, maxProperties=2),
        obj({"a": whole()}, additionalProperties=False),
        {"type": "object", "additionalProperties": False},
        {"type": "object", "additionalProperties": arr(COLOR, 2), "maxProperties": 1},
        {
            "type": "object",
            "patternProperties": {"^k[0-9]$": whole(0, 9)},
            "additionalProperties": False,
            "maxProperties": 2,
        },
        {
            "type": "object",
            "patternProperties": {"^n_[a-z]{1,3}$": YES},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        },
    ],
    "required": [
        obj({"a": whole(), "b": YES, "c": text(4)}, required=["a"]),
        obj({"a": whole(), "b": YES, "c": text(4)}, required=[]),
        obj({"a": whole(), "b": YES, "c": text(4)}, required=["c"]),
        obj({"a": whole(), "b": YES, "c": text(4)}, required=["b", "a"]),
        {
            "type": "object",
            "properties": {"x": whole()},
            "required": ["x", "y"],
            "additionalProperties": YES,
            "maxProperties": 2,
        },
        obj({"user": obj({"id": whole(1, 9), "nick": text(5)}, required=["id"])}),
        obj({name: whole(0, 9) for name in "abcdefgh"}, required=["b", "d", "h"]),
        arr(obj({"a": YES, "b": YES}, required=["b"]), 2, minItems=1),
    ],
    "unions": [
        {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        {"type": ["string", "boolean"], "maxLength": 5},
        {"type": ["array", "null"], "items": whole(0, 9), "maxItems": 2},
        {
            "type": ["object", "boolean"],
            "properties": {"a": whole()},
            "required": ["a"],
            "additionalProperties": False,
        },
        obj(
            {
                "a": {"type": ["string", "null"], "maxLength": 4},
                "b": {"type": ["integer", "boolean"], "minimum": 1, "maximum": 3},
            }
        ),
        {"type": ["string", "integer", "null"], "maxLength": 3, "minimum": 0, "maximum": 7},
        arr({"type": ["boolean", "null"]}, 4, minItems=2),
        obj(
            {
                "v": {
                    "type": ["number", "string"],
                    "minimum": 0,
                    "maximum": 1,
                    "multipleOf": 0.5,
                    "maxLength": 3,
                }
            }
        ),
    ],
    "unicode": [
        {"const": "naïve café ☕ 日本語"},
        {"enum": ["ä", "ö", "ü", "ß"]},
        obj({"größe": whole(), "名前": text(6), "😀": YES}),
        pattern("^[α-ω]{2,6}$"),
        pattern("^[\u4e00-\u4e2f]{1,3}$"),
        {"enum": ["👍", "👎"]},
        obj({"é": {"const": "é"}, "e\u0301": {"const": "e\u0301"}}),
        text(4, minLength=1, description="日本語"),
        {"const": "\u2028\u00a0\ufeff"},
        obj({"emoji": {"enum": ["🦅", "🐦"]}, "straße": pattern("^[a-zäöüß]{3,6}$")}),
    ],
    "escapes": [
        {"const": 'say "hi" \\ / done'},
        {"const": "line\nbreak\ttab\r\b\f"},
        {"enum": ['"', "\\", "/"]},
        obj({'a"b': whole(), "c\\d": YES, "e\nf": NULL}),
        pattern('^"[a-z]{1,3}"$'),
        pattern("^\\\\[a-z]{1,3}$"),
        {"const": "\u0000\u0001\u001f"},
        obj({"": whole(), " ": YES, "a.b": NULL, "$ref": whole(0, 9)}),
        pattern("^\\n{1,2}$"),
        {"enum": ["{}", "[1, 2]", '{"a": "b"}']},
    ],
}
"""Schemas by the feature that they are about."""

PART: list[tuple[str, Schema]] = [
    (f"{feature}-{i}", schemas[i])
    for feature, schemas in FEATURES.items()
    for i in range(0, len(schemas), -(-len(schemas) // 2))
]
"""Two of each feature."""

SCHEMAS: list[tuple[str, Schema]] = [
    (f"{feature}-{i}", schema) for feature, schemas in FEATURES.items() for i, schema in enumerate(schemas)
]
