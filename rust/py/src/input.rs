//! Python values straight to template values: no JSON in between, tuples and integer keys kept.

use std::cell::Cell;

use hfcore_engine::template::{Input, Inputs};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple, PyType};

use crate::convert::{
    MAX_BYTES, MAX_DEPTH, Place, Step, VALUE_BYTES, is_list_like, refused, to_text, too_deep,
    type_name,
};
use crate::error::{invalid, to_py};

/// Texts that are remembered, each at the place its object's address says: messages and schemas have the same
/// few keys and words, and Python mostly one object for each.
const KNOWN: usize = 64;
/// Longer ones are not.
const SHORT: usize = 64;

/// Reads what one render is given.
pub struct Reader<'py> {
    inputs: Inputs,
    known: [Option<(Bound<'py, PyString>, Input)>; KNOWN],
}

impl Default for Reader<'_> {
    fn default() -> Self {
        Self {
            inputs: Inputs::default(),
            known: [const { None }; KNOWN],
        }
    }
}

impl<'py> Reader<'py> {
    /// What was read so far, about as bytes of text.
    pub fn bytes(&self) -> usize {
        self.inputs.bytes()
    }

    /// An argument of this name.
    pub fn read(&mut self, object: &Bound<'py, PyAny>, name: &str) -> PyResult<Input> {
        let left = Cell::new(MAX_BYTES);
        let place = Place::template(name).counted(&left);
        self.value(object, &place)
    }

    /// Keyword arguments.
    pub fn variables(&mut self, given: &Bound<'py, PyDict>) -> PyResult<Vec<(String, Input)>> {
        let left = Cell::new(MAX_BYTES);
        let place = Place::template("variables").counted(&left);
        let mut variables = Vec::with_capacity(given.len());
        for (name, value) in given.iter() {
            let name = to_text(name.cast::<PyString>()?, &place)?;
            let value = self.value(&value, &place.down(Step::Key(&name)))?;
            variables.push((name, value));
        }
        Ok(variables)
    }

    fn value(&mut self, object: &Bound<'py, PyAny>, place: &Place<'_>) -> PyResult<Input> {
        if place.depth > MAX_DEPTH {
            return Err(too_deep(object, place));
        }
        place.spend(object, VALUE_BYTES)?;
        if let Ok(text) = object.cast::<PyString>() {
            self.text(text, place)
        } else if let Ok(dict) = object.cast::<PyDict>() {
            self.dict(dict, place)
        } else if let Ok(list) = object.cast::<PyList>() {
            let mut items = Vec::with_capacity(list.len());
            for (i, item) in list.iter().enumerate() {
                items.push(self.value(&item, &place.down(Step::Index(i)))?);
            }
            self.made(object, |inputs| inputs.list(items))
        } else if object.is_none() {
            Ok(self.inputs.none())
        } else if let Ok(flag) = object.cast::<PyBool>() {
            Ok(self.inputs.bool(flag.is_true()))
        } else if object.is_instance_of::<PyInt>() {
            self.integer(object, place)
        } else if object.is_instance_of::<PyFloat>() {
            self.float(object, place)
        } else {
            self.other(object, place)
        }
    }

    /// What is not as common, or only like one of the common types.
    fn other(&mut self, object: &Bound<'py, PyAny>, place: &Place<'_>) -> PyResult<Input> {
        if let Ok(map) = object.cast::<PyMapping>() {
            let pairs = map.items()?;
            let mut entries = Vec::with_capacity(pairs.len());
            for pair in pairs.iter() {
                let (key, value) = pair.extract()?;
                entries.push(self.entry(&key, &value, place)?);
            }
            self.made(object, |inputs| inputs.dict(entries))
        } else if is_list_like(object) {
            let mut items = Vec::new();
            for (i, item) in object.try_iter()?.enumerate() {
                items.push(self.value(&item?, &place.down(Step::Index(i)))?);
            }
            self.made(object, |inputs| match object.is_instance_of::<PyTuple>() {
                true => inputs.tuple(items),
                false => inputs.list(items),
            })
        } else if object.hasattr("__index__")? {
            self.integer(object, place) // numpy's integers
        } else if object.hasattr("__float__")? {
            self.float(object, place) // numpy's floats, Decimal
        } else if is_dataclass(object)? {
            self.dataclass(object, place)
        } else if object.hasattr("model_dump")? {
            let plain = object.call_method0("model_dump")?;
            self.value(&plain, &place.down(Step::Key("model_dump()")))
        } else {
            Err(refused(
                object,
                place,
                "None, bool, int, float, str, a sequence or a mapping",
            ))
        }
    }

    fn dataclass(&mut self, object: &Bound<'py, PyAny>, place: &Place<'_>) -> PyResult<Input> {
        let fields = object.py().import("dataclasses")?;
        let mut entries = Vec::new();
        for field in fields.call_method1("fields", (object,))?.try_iter()? {
            let name = field?.getattr("name")?;
            let value = object.getattr(name.cast::<PyString>()?)?;
            entries.push(self.entry(&name, &value, place)?);
        }
        self.made(object, |inputs| inputs.dict(entries))
    }

    fn dict(&mut self, dict: &Bound<'py, PyDict>, place: &Place<'_>) -> PyResult<Input> {
        let mut entries = Vec::with_capacity(dict.len());
        let mut texts = true;
        for (key, value) in dict.iter() {
            // A class of its own may call different texts equal, and equal ones different.
            texts &= key.is_exact_instance_of::<PyString>();
            entries.push(self.entry(&key, &value, place)?);
        }
        self.made(dict.as_any(), |inputs| match texts {
            true => inputs.object(entries),
            false => inputs.dict(entries),
        })
    }

    fn entry(
        &mut self,
        key: &Bound<'py, PyAny>,
        value: &Bound<'py, PyAny>,
        place: &Place<'_>,
    ) -> PyResult<(Input, Input)> {
        let Ok(text) = key.cast::<PyString>() else {
            if key.is_instance_of::<PyInt>() && !key.is_instance_of::<PyBool>() {
                let value = self.value(value, &place.down(Step::Key(&key.str()?.to_cow()?)))?;
                return Ok((self.integer(key, place)?, value));
            }
            let problem = format!("keys of {place} must be str, got {}", type_name(key));
            return Err(invalid(key.py(), problem));
        };
        let key = self.text(text, place)?;
        let value = self.value(value, &place.down(Step::Name(text)))?;
        Ok((key, value))
    }

    fn text(&mut self, text: &Bound<'py, PyString>, place: &Place<'_>) -> PyResult<Input> {
        let at = (text.as_ptr() as usize >> 4) % KNOWN;
        if let Some((known, input)) = &self.known[at]
            && known.is(text)
        {
            place.spend(text.as_any(), input.bytes())?;
            return Ok(self.inputs.again(input));
        }
        let Ok(utf8) = text.to_str() else {
            // Says what is wrong with it.
            return to_text(text, place).map(|text| self.inputs.text(text));
        };
        place.spend(text.as_any(), utf8.len())?;
        let input = self.inputs.text(utf8);
        if utf8.len() <= SHORT {
            self.known[at] = Some((text.clone(), input.clone()));
        }
        Ok(input)
    }

    fn integer(&mut self, object: &Bound<'py, PyAny>, place: &Place<'_>) -> PyResult<Input> {
        if let Ok(number) = object.extract::<i64>() {
            return Ok(self.inputs.int(number.into()));
        }
        // Python itself refuses to write out more than some thousand digits.
        let Ok(digits) = object.call_method0("__index__").and_then(|i| i.str()) else {
            let problem =
                format!("{place} must be an int of at most 4300 digits, got a larger one");
            return Err(invalid(object.py(), problem));
        };
        let digits = digits.to_cow()?;
        self.made(object, |inputs| inputs.integer(&digits))
    }

    fn float(&mut self, object: &Bound<'py, PyAny>, place: &Place<'_>) -> PyResult<Input> {
        let number = object.extract::<f64>()?;
        if !number.is_finite() {
            let shown = if number.is_nan() {
                "NaN".to_owned()
            } else {
                number.to_string()
            };
            let problem = format!("{place} must be finite, got {shown}");
            return Err(invalid(object.py(), problem));
        }
        Ok(self.inputs.float(number))
    }

    fn made(
        &mut self,
        object: &Bound<'py, PyAny>,
        make: impl FnOnce(&mut Inputs) -> hfcore_engine::error::Result<Input>,
    ) -> PyResult<Input> {
        make(&mut self.inputs).map_err(|error| to_py(object.py(), error))
    }
}

fn is_dataclass(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(!object.is_instance_of::<PyType>() && object.get_type().hasattr("__dataclass_fields__")?)
}
