//! Python values to the engine's and back. What has no counterpart is refused by name.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use hfcore_engine::template::BIG_INT_KEY;
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyMapping, PySequence, PyString,
    PyTuple,
};
use serde_json::{Map, Number, Value, json};

use crate::error::invalid;

/// Deeper nesting is refused: it is a cycle, or an attack.
pub const MAX_DEPTH: usize = 100;

/// More than this in one argument is refused: lists that hold one another many times grow without bound as they are
/// copied. Text counts by its bytes, every value `VALUE_BYTES` beside.
pub const MAX_BYTES: usize = 1 << 26;
pub const VALUE_BYTES: usize = 16;

/// Where a value stands, for errors: prints as `messages[0].content`. Costs nothing until then.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    above: Option<&'a Place<'a>>,
    step: Step<'a>,
    pub depth: usize,
    /// Integers beyond 64 bits pass, in the form that templates read.
    big_integers: bool,
    /// What is left of `MAX_BYTES`, where it is counted.
    left: Option<&'a Cell<usize>>,
}

#[derive(Clone, Copy)]
pub enum Step<'a> {
    Root(&'a str),
    Key(&'a str),
    Name(&'a Bound<'a, PyString>),
    Index(usize),
}

impl<'a> Place<'a> {
    /// A value of a request, called `name`.
    pub fn request(name: &'a str) -> Self {
        Self {
            above: None,
            step: Step::Root(name),
            depth: 0,
            big_integers: false,
            left: None,
        }
    }

    /// A value that only a chat template looks at.
    pub fn template(name: &'a str) -> Self {
        Self {
            big_integers: true,
            ..Self::request(name)
        }
    }

    /// The same place, with its values counted: `MAX_BYTES` of them pass.
    pub fn counted(self, left: &'a Cell<usize>) -> Self {
        Self {
            left: Some(left),
            ..self
        }
    }

    /// Count a value; an error once there are too many.
    pub fn spend(&self, object: &Bound<'_, PyAny>, bytes: usize) -> PyResult<()> {
        let Some(cell) = self.left else { return Ok(()) };
        match cell.get().checked_sub(bytes) {
            Some(left) => {
                cell.set(left);
                Ok(())
            }
            None => Err(invalid(
                object.py(),
                format!(
                    "{} must hold at most {MAX_BYTES} bytes, got more",
                    self.top()
                ),
            )),
        }
    }

    /// The argument that the value is in.
    fn top(&self) -> &Place<'a> {
        self.above.map_or(self, Place::top)
    }

    pub fn down(&'a self, step: Step<'a>) -> Self {
        Self {
            above: Some(self),
            step,
            depth: self.depth + 1,
            ..*self
        }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(above) = self.above {
            above.fmt(f)?;
        }
        match self.step {
            Step::Root(name) => f.write_str(name),
            Step::Key(key) => write!(f, ".{key}"),
            Step::Name(key) => write!(f, ".{}", key.to_cow().unwrap_or_default()),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// A mapping with string keys as a serde object. Integer keys become text, as in JSON.
pub fn to_object(object: &Bound<'_, PyAny>, place: Place<'_>) -> PyResult<Map<String, Value>> {
    let left = Cell::new(MAX_BYTES);
    let place = Place {
        left: Some(&left),
        ..place
    };
    match object.cast::<PyMapping>() {
        Ok(map) => to_map(map, &place),
        Err(_) => Err(refused(object, &place, "a mapping")),
    }
}

/// A JSON-like Python value (None, bool, int, float, str, sequences, mappings) as a serde one.
/// Tuples become lists.
pub fn to_value(object: &Bound<'_, PyAny>, place: Place<'_>) -> PyResult<Value> {
    let left = Cell::new(MAX_BYTES);
    let place = Place {
        left: Some(&left),
        ..place
    };
    value_at(object, &place)
}

/// A mapping of text to text.
pub fn to_strings(object: &Bound<'_, PyAny>, name: &str) -> PyResult<BTreeMap<String, String>> {
    let entries = to_object(object, Place::request(name))?.into_iter();
    let strings = entries.map(|(key, value)| match value {
        Value::String(value) => Ok((key, value)),
        other => Err(invalid(
            object.py(),
            format!("{name}.{key} must be a str, got {other}"),
        )),
    });
    strings.collect()
}

/// Text; a lone surrogate in it is refused by name.
pub fn to_string(text: &Bound<'_, PyString>, name: &str) -> PyResult<String> {
    to_text(text, &Place::request(name))
}

fn value_at(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Value> {
    if place.depth > MAX_DEPTH {
        return Err(too_deep(object, place));
    }
    place.spend(object, VALUE_BYTES)?;
    if let Ok(text) = object.cast::<PyString>() {
        place.spend(object, text.len()?)?;
        to_text(text, place).map(Value::String)
    } else if object.is_none() {
        Ok(Value::Null)
    } else if let Ok(flag) = object.cast::<PyBool>() {
        Ok(Value::Bool(flag.is_true()))
    } else if object.is_instance_of::<PyInt>() {
        to_integer(object, place)
    } else if object.is_instance_of::<PyFloat>() {
        to_float(object, place)
    } else if let Ok(map) = object.cast::<PyMapping>() {
        to_map(map, place).map(Value::Object)
    } else if is_list_like(object) {
        to_array(object, place)
    } else if object.hasattr("__index__")? {
        to_integer(object, place) // numpy's integers
    } else if object.hasattr("__float__")? {
        to_float(object, place) // numpy's floats, Decimal
    } else {
        Err(refused(
            object,
            place,
            "None, bool, int, float, str, a sequence or a mapping",
        ))
    }
}

fn to_map(map: &Bound<'_, PyMapping>, place: &Place<'_>) -> PyResult<Map<String, Value>> {
    let mut out = Map::new();
    for pair in map.items()?.iter() {
        let (key, value) = pair.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        let key = to_key(&key, place)?;
        let value = value_at(&value, &place.down(Step::Key(&key)))?;
        out.insert(key, value);
    }
    Ok(out)
}

/// A mapping's key as JSON has it: text, an integer written out.
pub fn to_key(key: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<String> {
    if let Ok(text) = key.cast::<PyString>() {
        return to_text(text, place);
    }
    if key.is_instance_of::<PyInt>() && !key.is_instance_of::<PyBool>() {
        return Ok(key.str()?.to_cow()?.into_owned());
    }
    Err(invalid(
        key.py(),
        format!("keys of {place} must be str, got {}", type_name(key)),
    ))
}

fn to_array(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Value> {
    let items = object.try_iter()?.enumerate();
    let values = items.map(|(i, item)| value_at(&item?, &place.down(Step::Index(i))));
    values.collect::<PyResult<Vec<_>>>().map(Value::Array)
}

/// Lists, tuples and other sequences, but not the ones that are one value: text and bytes.
pub fn is_list_like(object: &Bound<'_, PyAny>) -> bool {
    let known = object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>();
    let whole = object.is_instance_of::<PyString>()
        || object.is_instance_of::<PyBytes>()
        || object.is_instance_of::<PyByteArray>();
    known || !whole && object.cast::<PySequence>().is_ok()
}

fn to_integer(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Value> {
    if let Ok(number) = object.extract::<i64>() {
        return Ok(Value::from(number));
    }
    if let Ok(number) = object.extract::<u64>() {
        return Ok(Value::from(number));
    }
    // Python itself refuses to write out more than some thousand digits.
    match object.str() {
        Ok(digits) if place.big_integers => Ok(json!({ BIG_INT_KEY: digits.to_cow()? })),
        _ => {
            let problem = format!("{place} must be an int of at most 64 bits, got a larger one");
            Err(invalid(object.py(), problem))
        }
    }
}

fn to_float(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Value> {
    let number = object.extract::<f64>()?;
    let finite = Number::from_f64(number).map(Value::Number);
    finite.ok_or_else(|| invalid(object.py(), format!("{place} must be finite, got {number}")))
}

pub fn to_text(text: &Bound<'_, PyString>, place: &Place<'_>) -> PyResult<String> {
    let problem = |_| {
        invalid(
            text.py(),
            format!("{place} must be text, got a lone surrogate in it"),
        )
    };
    text.to_cow().map(|text| text.into_owned()).map_err(problem)
}

pub fn too_deep(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyErr {
    let top = place.top();
    invalid(
        object.py(),
        format!("{top} must be nested at most {MAX_DEPTH} deep, got more"),
    )
}

pub fn refused(object: &Bound<'_, PyAny>, place: &Place<'_>, wanted: &str) -> PyErr {
    invalid(
        object.py(),
        format!("{place} must be {wanted}, got {}", type_name(object)),
    )
}

/// The name of a value's type, for errors.
pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    object
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// A serde value as plain Python ones.
pub fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(flag) => PyBool::new(py, *flag).to_owned().into_any(),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => number.into_pyobject(py)?.into_any(),
            (_, Some(number), _) => number.into_pyobject(py)?.into_any(),
            (_, _, number) => number.into_pyobject(py)?.into_any(),
        },
        Value::String(text) => PyString::new(py, text).into_any(),
        Value::Array(items) => {
            let items = items.iter().map(|item| to_python(py, item));
            PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)?.into_any()
        }
        Value::Object(map) => {
            let out = PyDict::new(py);
            for (key, value) in map {
                out.set_item(key, to_python(py, value)?)?;
            }
            out.into_any()
        }
    })
}

/// A list of str.
pub fn to_texts(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<String>> {
    if object.cast::<PyString>().is_ok() {
        let problem = format!("{name} must be a list of str, got a str");
        return Err(invalid(object.py(), problem));
    }
    let mut texts = Vec::new();
    for item in object.try_iter()? {
        let item = item?;
        let Ok(text) = item.cast::<PyString>() else {
            let problem = format!(
                "{name} must be a list of str, got {} in it",
                type_name(&item)
            );
            return Err(invalid(object.py(), problem));
        };
        texts.push(to_string(text, name)?);
    }
    Ok(texts)
}

/// Token ids: a numpy array of one dimension, or any sequence of ints.
pub fn to_ids(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<u32>> {
    let root = Place::request(name);
    // Plain sequences first: they need no numpy, which is slow to import.
    if !is_list_like(object) {
        if let Ok(array) = object.extract::<PyReadonlyArray1<'_, u32>>() {
            return Ok(array.as_array().to_vec());
        }
        let Ok(array) = object.cast::<PyUntypedArray>() else {
            return Err(refused(object, &root, "a sequence of token ids"));
        };
        if array.ndim() != 1 {
            let problem = format!("{name} must have 1 dimension, got {}", array.ndim());
            return Err(invalid(object.py(), problem));
        }
    }
    let items = object.try_iter()?.enumerate();
    items
        .map(|(i, item)| id_at(&item?, &root.down(Step::Index(i))))
        .collect()
}

fn id_at(object: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<u32> {
    object.extract::<u32>().map_err(|_| {
        let shown = object
            .repr()
            .map_or_else(|_| type_name(object), |repr| repr.to_string());
        invalid(
            object.py(),
            format!("{place} must be an int from 0 to {}, got {shown}", u32::MAX),
        )
    })
}

/// A count or a size, from 0 up; None is none.
pub fn to_size(object: Option<&Bound<'_, PyAny>>, name: &str) -> PyResult<Option<usize>> {
    let Some(object) = object else {
        return Ok(None);
    };
    let flag = object.is_instance_of::<PyBool>();
    match object.extract::<usize>() {
        Ok(size) if !flag => Ok(Some(size)),
        _ => {
            let shown = object.repr()?;
            Err(invalid(
                object.py(),
                format!("{name} must be an int from 0 up, got {shown}"),
            ))
        }
    }
}

/// Rows of bytes: a numpy array of uint8 and two dimensions.
pub fn to_bytes(object: &Bound<'_, PyAny>, name: &str) -> PyResult<(usize, Vec<u8>)> {
    let Ok(array) = object.extract::<PyReadonlyArray2<'_, u8>>() else {
        let place = Place::request(name);
        return Err(refused(
            object,
            &place,
            "a numpy array of uint8 with 2 dimensions",
        ));
    };
    Ok((array.shape()[0], array.as_array().iter().copied().collect()))
}

/// A path from a str or an os.PathLike.
pub fn to_path(object: &Bound<'_, PyAny>) -> PyResult<PathBuf> {
    object.extract().map_err(|_| {
        PyTypeError::new_err(format!(
            "path must be str or os.PathLike, got {}",
            type_name(object)
        ))
    })
}
