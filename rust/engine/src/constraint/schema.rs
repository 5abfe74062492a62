//! A JSON schema made ready for llguidance: what cannot be enforced is refused by name, what is left open is closed.

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Schemas are written by callers, and for some callers by strangers.
const MAX_BYTES: usize = 1 << 20;
const MAX_DEPTH: usize = 64;

/// The schema as an item of a Lark rule.
///
/// An object that names properties and says nothing of others takes no others, which JSON Schema would allow: a model
/// left alone would invent some. Documents are written on one line, with ", " and ": ".
///
/// # Errors
/// `InvalidRequest` for what is no schema, is too large or too deep, or cannot be enforced.
pub fn rule(schema: &Value) -> Result<String> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        other => return Err(refused(format!("it must be an object, got {other:.60}"))),
    };
    let size = schema.to_string().len();
    if size > MAX_BYTES {
        return Err(refused(format!(
            "it must have at most {MAX_BYTES} bytes, got {size}"
        )));
    }
    prepare(&mut schema, true, 0)?;
    schema["x-guidance"] = json!({
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": false,
        // No \u: then each string has one spelling, and a key cannot return in disguise.
        "json_allowed_escapes": "nrbtf\\\"",
    });
    Ok(format!("%json {schema}"))
}

fn refused(problem: String) -> Error {
    Error::InvalidRequest(format!("the JSON schema cannot be used: {problem}"))
}

/// Keywords whose values are schemas: one, a list, or one for each name.
const ONE: [&str; 5] = [
    "items",
    "additionalProperties",
    "additionalItems",
    "not",
    "contains",
];
const LISTS: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

fn prepare(schema: &mut Value, close: bool, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(refused(format!("it is nested more than {MAX_DEPTH} deep")));
    }
    let Value::Object(map) = schema else {
        return Ok(());
    };
    map.remove("x-guidance");
    if map.get("uniqueItems") == Some(&Value::Bool(false)) {
        map.remove("uniqueItems");
    }
    // Parts of an intersection must stay open, or each would forbid the properties of the others.
    let parts = map
        .get("allOf")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    let shared = parts > 1 || (parts == 1 && map.contains_key("properties"));
    if close && !shared && is_closable(map) {
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
    keys_once(map)?;
    open_bounds(map);
    for key in ONE {
        if let Some(inner) = map.get_mut(key) {
            prepare(inner, true, depth + 1)?;
        }
    }
    for key in LISTS {
        let inner = map.get_mut(key).and_then(Value::as_array_mut);
        for inner in inner.into_iter().flatten() {
            prepare(inner, key != "allOf" || !shared, depth + 1)?;
        }
    }
    for key in NAMED {
        let inner = map.get_mut(key).and_then(Value::as_object_mut);
        for inner in inner.into_iter().flat_map(Map::values_mut) {
            prepare(inner, true, depth + 1)?;
        }
    }
    Ok(())
}

fn is_closable(map: &Map<String, Value>) -> bool {
    let named = map.get("properties").is_some_and(Value::is_object);
    let says = [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
    ];
    named && !says.iter().any(|key| map.contains_key(*key))
}

/// llguidance 1.9.1 lets a number reach an exclusive bound below 0 (-1 for `exclusiveMaximum` -1); a hair inside
/// it, the bound is met.
fn open_bounds(map: &mut Map<String, Value>) {
    if map.get("type").is_some_and(|kind| kind == "integer") {
        return;
    }
    for (open, closed, side) in [
        ("exclusiveMaximum", "maximum", -1.0),
        ("exclusiveMinimum", "minimum", 1.0),
    ] {
        let Some(bound) = map
            .get(open)
            .and_then(Value::as_f64)
            .filter(|bound| *bound < 0.0)
        else {
            continue;
        };
        let inside = bound + side * bound.abs().max(1.0) * 1e-9;
        let other = map.get(closed).and_then(Value::as_f64).unwrap_or(inside);
        let tighter = if side < 0.0 {
            inside.min(other)
        } else {
            inside.max(other)
        };
        map.remove(open);
        map.insert(closed.into(), json!(tighter));
    }
}

/// Free keys may be written twice and count once, so more than one of them cannot be demanded.
fn keys_once(map: &Map<String, Value>) -> Result<()> {
    let least = map
        .get("minProperties")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let required = map
        .get("required")
        .and_then(Value::as_array)
        .map_or(0, Vec::len) as u64;
    match least > required + 1 {
        true => Err(refused(format!(
            "minProperties {least} cannot be enforced beside {required} required properties"
        ))),
        false => Ok(()),
    }
}
