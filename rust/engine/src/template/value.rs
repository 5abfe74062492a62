//! Python's values as a chat template sees them: text, repr, truth, equality, order, under a budget.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};

use super::filters::sequence::Job;
use super::globals::Builtin;
use super::methods::Method;
use super::origin::{Origin, Str, all_data};

/// Deepest nesting of lists and dicts; keeps every walk over a value within the stack.
const MAX_DEPTH: u16 = 160;
/// What a template may spend, whatever it is given: evaluation steps, and bytes of text made.
const BASE_STEPS: u64 = 20_000_000;
const BASE_BYTES: u64 = 256 << 20;
/// More of both per byte of input, so that long conversations render.
const PER_INPUT_BYTE: u64 = 256;

/// Key of an object that stands for an integer which JSON numbers cannot hold; its value is the
/// decimal text. The NUL keeps it apart from every real key.
pub const BIG_INT_KEY: &str = "\u{0}int";

/// Why a render ended early: the message, whether the template raised it itself, and the line.
#[derive(Debug)]
pub(super) struct Fault {
    pub message: String,
    pub thrown: bool,
    pub line: Option<u32>,
}

pub(super) type Res<T> = Result<T, Box<Fault>>;

pub(super) fn fault<T>(message: impl Into<String>) -> Res<T> {
    Err(Box::new(Fault {
        message: message.into(),
        thrown: false,
        line: None,
    }))
}

/// What is left to spend in this render. Everything that loops or allocates draws on it.
pub(super) struct Budget {
    steps: u64,
    bytes: u64,
    /// The origin of text that is made of data, or of who knows what; None where nobody asks.
    unsure: Origin,
    /// The render's namespaces: values hold their numbers, for references would make cycles.
    pub namespaces: Vec<Vec<(Arc<str>, Value)>>,
    /// Namespaces that are being printed, and what holds items while there are namespaces.
    printing: Vec<Printing>,
}

/// What may come round again while it is printed: a namespace by its number, others by their address.
#[derive(Clone, Copy, PartialEq)]
enum Printing {
    Namespace(usize),
    Items(usize),
}

impl Budget {
    pub fn for_input(bytes: usize) -> Budget {
        let extra = (bytes as u64).saturating_mul(PER_INPUT_BYTE);
        Budget {
            steps: BASE_STEPS + extra,
            bytes: BASE_BYTES + extra,
            unsure: None,
            namespaces: Vec::new(),
            printing: Vec::new(),
        }
    }

    /// From here on, text remembers where it came from.
    pub fn follow_data(&mut self) {
        self.unsure = all_data();
    }

    /// The origin of text that is made of numbers, containers and the like.
    pub fn unsure(&self) -> Origin {
        self.unsure.clone()
    }

    pub fn steps(&mut self, n: usize) -> Res<()> {
        match self.steps.checked_sub(n as u64) {
            Some(left) => self.steps = left,
            None => return fault("the template runs too long: its steps are used up"),
        }
        Ok(())
    }

    /// Pay for `n` bytes before they are made.
    pub fn bytes(&mut self, n: usize) -> Res<()> {
        match self.bytes.checked_sub(n as u64) {
            Some(left) => self.bytes = left,
            None => return fault("the template makes too much text: its bytes are used up"),
        }
        self.steps(n / 64)
    }
}

#[derive(Debug)]
pub(super) struct Seq {
    pub items: Vec<Value>,
    depth: u16,
}

/// A dict in insertion order, never changed after it is built (the sandbox is immutable).
#[derive(Debug, Default)]
pub(super) struct Dict {
    pub entries: Vec<(Value, Value)>,
    index: Option<HashMap<Key, usize>>,
    depth: u16,
}

/// Beyond this many entries a dict keeps an index.
const SCAN: usize = 12;

/// A dict key as Python hashes it: `1`, `1.0` and `True` are one key.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    None,
    Undefined,
    Int(i128),
    Float(u64),
    Text(Arc<str>),
    Big(Arc<str>),
    Tuple(Vec<Key>),
    Range(i128, i128, i128),
    Object(usize),
}

impl Key {
    pub fn of(value: &Value, budget: &mut Budget) -> Res<Key> {
        budget.steps(1)?;
        Ok(match value {
            Value::None => Key::None,
            Value::Bool(b) => Key::Int(i128::from(*b)),
            Value::Int(i) => Key::Int(*i),
            Value::Float(f) if f.fract() == 0.0 && f.abs() < 1e38 => Key::Int(*f as i128),
            Value::Float(f) => Key::Float(f.to_bits()),
            Value::Str(s) => {
                budget.steps(s.text.len() / 64)?;
                Key::Text(s.text.clone())
            }
            Value::Big(digits) => Key::Big(digits.clone()),
            Value::Undefined(_) => Key::Undefined,
            Value::Range(r) => Key::Range(r.start, r.stop, r.step),
            Value::Macro(m) => Key::Object(Arc::as_ptr(m) as usize),
            Value::Iter(i) => Key::Object(Arc::as_ptr(i) as usize),
            Value::Loop(l) => Key::Object(Arc::as_ptr(l) as usize),
            Value::Cycler(c) | Value::Joiner(c) => Key::Object(Arc::as_ptr(c) as usize),
            Value::Function(builtin) => Key::Object(*builtin as usize),
            // No address is as high.
            Value::Namespace(id) => Key::Object(usize::MAX - id),
            Value::Method(m) => Key::Object(Arc::as_ptr(m).addr()),
            Value::Tuple(t) => Key::Tuple(
                t.items
                    .iter()
                    .map(|v| Key::of(v, budget))
                    .collect::<Res<_>>()?,
            ),
            other => return fault(format!("unhashable type: '{}'", other.type_name())),
        })
    }
}

impl Dict {
    pub fn get(&self, key: &Value, budget: &mut Budget) -> Res<Option<&Value>> {
        if let Value::Str(s) = key {
            budget.steps(s.text.len() / 64)?;
            return Ok(self.get_str(&s.text));
        }
        let key = Key::of(key, budget)?;
        if let Some(index) = &self.index {
            return Ok(index.get(&key).map(|&i| &self.entries[i].1));
        }
        for (k, v) in &self.entries {
            if Key::of(k, budget)? == key {
                return Ok(Some(v));
            }
        }
        Ok(None)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        if let Some(index) = &self.index {
            return index
                .get(&Key::Text(key.into()))
                .map(|&i| &self.entries[i].1);
        }
        let found = self
            .entries
            .iter()
            .find(|(k, _)| matches!(k, Value::Str(s) if *s.text == *key));
        found.map(|(_, v)| v)
    }
}

/// `dict.keys()`, `.values()` and `.items()`.
#[derive(Debug)]
pub(super) struct View {
    pub type_name: &'static str,
    pub items: Vec<Value>,
    depth: u16,
}

impl View {
    fn is_set(&self) -> bool {
        self.type_name != "dict_values"
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

impl Range {
    pub fn len(&self) -> usize {
        let (from, to, by) = match self.step > 0 {
            true => (self.start, self.stop, self.step),
            false => (self.stop, self.start, self.step.saturating_neg()),
        };
        if from >= to {
            0
        } else {
            let items = (to.saturating_sub(from) - 1) / by + 1;
            usize::try_from(items).unwrap_or(usize::MAX)
        }
    }
    pub fn at(&self, i: usize) -> Value {
        Value::Int(self.start + i as i128 * self.step)
    }
}

/// A generator: what `map`, `select` and the like return. Its items can be taken once, and are made
/// as they are taken.
#[derive(Debug)]
pub(super) struct Iter {
    pub type_name: &'static str,
    /// Jinja2's function that makes such a generator; of another iterator nothing.
    function: &'static str,
    source: Mutex<Source>,
    depth: u16,
}

/// Where Python prints an address, as long as one.
const NOWHERE: &str = " at 0x7f0000000000";

impl Iter {
    /// As Python prints it: a generator by the function that made it.
    fn shown(&self) -> String {
        match self.function {
            "" => format!("<{} object{NOWHERE}>", self.type_name),
            function => format!("<generator object {function}{NOWHERE}>"),
        }
    }

    /// Take what makes the items out, to use it; who comes meanwhile finds nothing.
    pub fn take(&self) -> Source {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut source, Source::Items(Vec::new().into_iter()))
    }

    pub fn put(&self, source: Source) {
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = source;
    }
}

/// Where items come from.
#[derive(Debug)]
pub(super) enum Source {
    Items(std::vec::IntoIter<Value>),
    Seq(Arc<Seq>, usize),
    Shared(Arc<Iter>),
    Made(Box<Source>, Arc<Job>),
    /// A loop's condition: the loop, and the scope it is in.
    Filtered(Box<Source>, usize, usize),
    /// What fails as soon as an item is wanted.
    Failing(String),
}

/// The state behind the variable `loop`.
#[derive(Debug)]
pub(super) struct LoopState {
    pub depth: usize,
    /// Which `for` this is, and the scope around it: for `loop(children)`.
    pub id: usize,
    pub scope: usize,
    pub turn: Mutex<Turn>,
    pub changed: Mutex<Option<Vec<Value>>>,
    /// How deep the items nest.
    pub nests: u16,
}

/// Where a loop is.
#[derive(Debug)]
pub(super) struct Turn {
    pub source: Source,
    /// How many items there are, where that is known without taking them.
    pub len: Option<usize>,
    pub index: usize,
    pub before: Option<Value>,
    pub current: Option<Value>,
    /// An item that was looked at ahead of its turn.
    pub after: Option<Value>,
}

impl LoopState {
    /// The place of the current item, from 0.
    pub fn index(&self) -> usize {
        self.turn().index
    }
    pub fn turn(&self) -> std::sync::MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A macro, or the body of a call block, with the scope it was defined in.
#[derive(Debug)]
pub(super) struct Closure {
    /// None for the body of a call block.
    pub name: Option<Arc<str>>,
    pub id: usize,
    pub scope: usize,
}

/// `cycler(...)` or `joiner(sep)`: counts its uses.
#[derive(Debug)]
pub(super) struct Counter {
    pub items: Arc<Seq>,
    pub used: AtomicUsize,
}

/// What is not there: the name it was asked for by, and where.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    what: Arc<str>,
    place: u8,
}

/// `Missing::place`: `what` is the whole message, a variable, a parameter; from 3 on, an attribute of
/// a value whose type stands in `TYPES`.
const MESSAGE: u8 = 0;
const VARIABLE: u8 = 1;
const PARAMETER: u8 = 2;
const ATTRIBUTE: u8 = 3;

impl Missing {
    /// What its use raises.
    pub fn message(&self) -> String {
        let what = &self.what;
        match self.place {
            MESSAGE => what.to_string(),
            VARIABLE => format!("'{what}' is undefined"),
            PARAMETER => format!("parameter '{what}' was not provided"),
            place => match TYPES.get(usize::from(place - ATTRIBUTE)) {
                Some(&"NoneType") | None => format!("'None' has no attribute '{what}'"),
                Some(owner) => format!("'{owner} object' has no attribute '{what}'"),
            },
        }
    }

    pub fn fault<T>(&self) -> Res<T> {
        fault(self.message())
    }
}

/// The types' names, in the order of `Value::type_index`.
const TYPES: [&str; 20] = [
    "Undefined",
    "NoneType",
    "bool",
    "int",
    "float",
    "str",
    "Markup",
    "list",
    "tuple",
    "dict",
    "dict_keys",
    "dict_values",
    "dict_items",
    "range",
    "TemplateNamespace",
    "Macro",
    "LoopContext",
    "Cycler",
    "Joiner",
    "function",
];

#[derive(Clone, Debug)]
pub(super) enum Value {
    Undefined(Missing),
    None,
    Bool(bool),
    Int(i128),
    /// An integer past 128 bits, as its decimal text: it can be carried, compared and printed.
    Big(Arc<str>),
    Float(f64),
    Str(Str),
    List(Arc<Seq>),
    Tuple(Arc<Seq>),
    Dict(Arc<Dict>),
    View(Arc<View>),
    Range(Arc<Range>),
    Iter(Arc<Iter>),
    /// An index into the run's namespaces: a reference would make cycles that are never freed.
    Namespace(usize),
    Macro(Arc<Closure>),
    Loop(Arc<LoopState>),
    Cycler(Arc<Counter>),
    Joiner(Arc<Counter>),
    Function(Builtin),
    /// A method not yet called: the object and which.
    Method(Arc<(Value, Method)>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Str(Str::from(text))
    }
}

/// Are all keys text, and no two alike? For few.
fn differ(pairs: &[(Value, Value)]) -> bool {
    let texts = |i: usize| match &pairs[i].0 {
        Value::Str(s) => Some(&*s.text),
        _ => None,
    };
    (0..pairs.len())
        .all(|i| texts(i).is_some_and(|text| (0..i).all(|other| texts(other) != Some(text))))
}

fn depth_of<'a>(values: impl Iterator<Item = &'a Value>) -> Res<u16> {
    let depth = 1 + values.map(Value::depth).max().unwrap_or(0);
    if depth > MAX_DEPTH {
        return fault(format!("values nest deeper than {MAX_DEPTH}"));
    }
    Ok(depth)
}

impl Value {
    pub fn depth(&self) -> u16 {
        match self {
            Value::List(s) | Value::Tuple(s) => s.depth,
            Value::Dict(d) => d.depth,
            Value::View(v) => v.depth,
            Value::Iter(i) => i.depth,
            Value::Loop(l) => l.nests,
            Value::Cycler(c) | Value::Joiner(c) => c.items.depth,
            Value::Method(m) => 1 + m.0.depth(),
            _ => 0,
        }
    }

    /// Undefined, with the message its use raises.
    pub fn undefined(message: impl Into<Arc<str>>) -> Value {
        let what = message.into();
        Value::Undefined(Missing {
            what,
            place: MESSAGE,
        })
    }
    pub fn no_variable(name: &Arc<str>) -> Value {
        let what = name.clone();
        Value::Undefined(Missing {
            what,
            place: VARIABLE,
        })
    }
    pub fn no_parameter(name: &Arc<str>) -> Value {
        let what = name.clone();
        Value::Undefined(Missing {
            what,
            place: PARAMETER,
        })
    }
    /// What `self.name` is where there is no such thing.
    pub fn no_attribute(&self, name: &Arc<str>) -> Value {
        let place = ATTRIBUTE + self.type_index() as u8;
        let what = name.clone();
        Value::Undefined(Missing { what, place })
    }
    /// A text made of values that are no text.
    pub fn made(text: String, budget: &Budget) -> Value {
        Value::Str(Str {
            text: text.into(),
            markup: false,
            origin: budget.unsure(),
        })
    }
    pub fn int(n: usize) -> Value {
        Value::Int(n as i128)
    }
    /// A sequence of these items, paid for and not too deep.
    pub fn seq(items: Vec<Value>, budget: &mut Budget) -> Res<Arc<Seq>> {
        budget.bytes(items.len() * size_of::<Value>())?;
        let depth = depth_of(items.iter())?;
        Ok(Arc::new(Seq { items, depth }))
    }
    pub fn list(items: Vec<Value>, budget: &mut Budget) -> Res<Value> {
        Value::seq(items, budget).map(Value::List)
    }
    pub fn tuple(items: Vec<Value>, budget: &mut Budget) -> Res<Value> {
        Value::seq(items, budget).map(Value::Tuple)
    }
    pub fn iter(type_name: &'static str, items: Vec<Value>, budget: &mut Budget) -> Res<Value> {
        Self::walked((type_name, ""), items, budget)
    }
    /// What Jinja2's `function` gives.
    pub fn generator(function: &'static str, items: Vec<Value>, budget: &mut Budget) -> Res<Value> {
        Self::walked(("generator", function), items, budget)
    }
    fn walked(
        (type_name, function): (&'static str, &'static str),
        items: Vec<Value>,
        budget: &mut Budget,
    ) -> Res<Value> {
        budget.bytes(items.len() * size_of::<Value>())?;
        let depth = depth_of(items.iter())?;
        Ok(Value::Iter(Arc::new(Iter {
            type_name,
            function,
            source: Mutex::new(Source::Items(items.into_iter())),
            depth,
        })))
    }
    /// A generator that makes its items of another value's.
    pub fn making(source: Source, of: &Value, job: Job, budget: &mut Budget) -> Res<Value> {
        budget.bytes(size_of::<Job>())?;
        let depth = depth_of(std::iter::once(of).chain(job.values()))?;
        Ok(Value::Iter(Arc::new(Iter {
            type_name: "generator",
            function: job.function(),
            source: Mutex::new(Source::Made(Box::new(source), Arc::new(job))),
            depth,
        })))
    }
    /// A generator that fails as soon as an item is wanted.
    pub fn failing(message: impl Into<String>) -> Value {
        Value::Iter(Arc::new(Iter {
            type_name: "generator",
            function: "sync_do_map",
            source: Mutex::new(Source::Failing(message.into())),
            depth: 0,
        }))
    }
    pub fn view(type_name: &'static str, items: Vec<Value>, budget: &mut Budget) -> Res<Value> {
        budget.bytes(items.len() * size_of::<Value>())?;
        let depth = depth_of(items.iter())?;
        Ok(Value::View(Arc::new(View {
            type_name,
            items,
            depth,
        })))
    }
    pub fn counter(items: Vec<Value>, budget: &mut Budget) -> Res<Arc<Counter>> {
        let items = Value::seq(items, budget)?;
        Ok(Arc::new(Counter {
            items,
            used: AtomicUsize::new(0),
        }))
    }
    /// A dict of these pairs; a later equal key replaces the value and keeps the place.
    pub fn dict(pairs: Vec<(Value, Value)>, budget: &mut Budget) -> Res<Value> {
        budget.bytes(pairs.len() * 2 * size_of::<Value>())?;
        let depth = depth_of(pairs.iter().map(|(_, v)| v))?;
        if pairs.len() <= SCAN && differ(&pairs) {
            return Ok(Value::Dict(Arc::new(Dict {
                entries: pairs,
                index: None,
                depth,
            })));
        }
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(pairs.len());
        let mut index: HashMap<Key, usize> = HashMap::with_capacity(pairs.len());
        for (key, value) in pairs {
            match index.entry(Key::of(&key, budget)?) {
                std::collections::hash_map::Entry::Occupied(at) => entries[*at.get()].1 = value,
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(entries.len());
                    entries.push((key, value));
                }
            }
        }
        let index = (entries.len() > SCAN).then_some(index);
        Ok(Value::Dict(Arc::new(Dict {
            entries,
            index,
            depth,
        })))
    }

    /// JSON as Python's json.loads would give it (and see [`BIG_INT_KEY`]).
    pub fn from_json(json: &serde_json::Value, budget: &mut Budget) -> Res<Value> {
        use serde_json::Value as Json;
        budget.steps(1)?;
        Ok(match json {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(i), _, _) => Value::Int(i.into()),
                (_, Some(u), _) => Value::Int(u.into()),
                (_, _, f) => Value::Float(f.unwrap_or(f64::NAN)),
            },
            Json::String(s) => Value::from(s.as_str()),
            Json::Array(items) => {
                let items = items
                    .iter()
                    .map(|v| Value::from_json(v, budget))
                    .collect::<Res<_>>()?;
                Value::list(items, budget)?
            }
            Json::Object(map) => match map.get(BIG_INT_KEY).and_then(Json::as_str) {
                Some(digits) if map.len() == 1 => Value::integer(digits)?,
                _ => Value::json_object(map, budget)?,
            },
        })
    }

    fn json_object(
        map: &serde_json::Map<String, serde_json::Value>,
        budget: &mut Budget,
    ) -> Res<Value> {
        let mut pairs = Vec::with_capacity(map.len());
        for (key, value) in map {
            pairs.push((Value::from(key.as_str()), Value::from_json(value, budget)?));
        }
        Value::object(pairs, budget)
    }

    /// A dict whose keys are texts that differ.
    pub fn object(pairs: Vec<(Value, Value)>, budget: &mut Budget) -> Res<Value> {
        if pairs.len() > SCAN {
            return Value::dict(pairs, budget);
        }
        budget.bytes(pairs.len() * 2 * size_of::<Value>())?;
        let depth = depth_of(pairs.iter().map(|(_, v)| v))?;
        Ok(Value::Dict(Arc::new(Dict {
            entries: pairs,
            index: None,
            depth,
        })))
    }

    /// An integer from its decimal text, of any length.
    pub fn integer(digits: &str) -> Res<Value> {
        if let Ok(i) = digits.parse() {
            return Ok(Value::Int(i));
        }
        let plain = digits.strip_prefix('-').unwrap_or(digits);
        if plain.is_empty() || plain.len() > 4300 || !plain.bytes().all(|b| b.is_ascii_digit()) {
            return fault(format!(
                "expected an integer of at most 4300 digits, got {} characters",
                digits.len()
            ));
        }
        Ok(Value::Big(digits.into()))
    }

    fn type_index(&self) -> usize {
        match self {
            Value::Undefined(_) => 0,
            Value::None => 1,
            Value::Bool(_) => 2,
            Value::Int(_) | Value::Big(_) => 3,
            Value::Float(_) => 4,
            Value::Str(s) => 5 + usize::from(s.markup),
            Value::List(_) => 7,
            Value::Tuple(_) => 8,
            Value::Dict(_) => 9,
            Value::View(v) => TYPES.iter().position(|t| *t == v.type_name).unwrap_or(10),
            Value::Range(_) => 13,
            Value::Namespace(_) => 14,
            Value::Macro(_) => 15,
            Value::Loop(_) => 16,
            Value::Cycler(_) => 17,
            Value::Joiner(_) => 18,
            Value::Function(_) | Value::Method(_) | Value::Iter(_) => 19,
        }
    }

    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Iter(i) => i.type_name,
            Value::Method(_) => "builtin_function_or_method",
            other => TYPES[other.type_index()],
        }
    }

    /// An index or count: ints and bools.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(i) => Some(*i),
            Value::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(f) => Some(*f),
            Value::Big(digits) => digits.parse().ok(),
            _ => self.as_int().map(|i| i as f64),
        }
    }
    pub fn is_undefined(&self) -> bool {
        matches!(self, Value::Undefined(_))
    }

    pub fn truth(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(i) => *i != 0,
            Value::Float(f) => *f != 0.0,
            Value::Str(s) => !s.text.is_empty(),
            Value::List(s) | Value::Tuple(s) => !s.items.is_empty(),
            Value::Dict(d) => !d.entries.is_empty(),
            Value::View(v) => !v.items.is_empty(),
            Value::Range(r) => r.len() > 0,
            _ => true,
        }
    }

    /// `len(value)`, or the TypeError's message.
    pub fn len(&self, budget: &mut Budget) -> Res<usize> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Str(s) => {
                budget.steps(s.text.len() / 256)?;
                s.text.chars().count()
            }
            Value::List(s) | Value::Tuple(s) => s.items.len(),
            Value::Dict(d) => d.entries.len(),
            Value::View(v) => v.items.len(),
            Value::Range(r) => r.len(),
            other => {
                return fault(format!(
                    "object of type '{}' has no len()",
                    other.type_name()
                ));
            }
        })
    }

    /// What `for x in value` walks over, for all but generators.
    pub fn items(&self, budget: &mut Budget) -> Res<Vec<Value>> {
        let items: Vec<Value> = match self {
            Value::Undefined(_) => Vec::new(),
            Value::Str(s) => {
                budget.bytes(s.text.len() * size_of::<Value>())?;
                s.text
                    .char_indices()
                    .map(|(i, c)| {
                        let one = s.part(i..i + c.len_utf8());
                        // Walking over a safe text gives plain characters.
                        Value::Str(Str {
                            markup: false,
                            ..one
                        })
                    })
                    .collect()
            }
            Value::List(s) | Value::Tuple(s) => s.items.clone(),
            Value::Dict(d) => d.entries.iter().map(|(k, _)| k.clone()).collect(),
            Value::View(v) => v.items.clone(),
            Value::Range(r) => (0..r.len()).map(|i| r.at(i)).collect(),
            other => return fault(format!("'{}' object is not iterable", other.type_name())),
        };
        budget.bytes(items.len() * size_of::<Value>())?;
        Ok(items)
    }

    /// `left == right`, as Python has it.
    pub fn equals(&self, other: &Value, budget: &mut Budget) -> Res<bool> {
        budget.steps(1)?;
        Ok(match (self, other) {
            (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
            (Value::Str(a), Value::Str(b)) => {
                budget.steps(a.text.len().min(b.text.len()) / 64)?;
                a.text == b.text
            }
            (Value::Big(a), Value::Big(b)) => a == b,
            (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
                if a.items.len() != b.items.len() {
                    return Ok(false);
                }
                for (x, y) in a.items.iter().zip(&b.items) {
                    if !x.equals(y, budget)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Dict(a), Value::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (k, x) in &a.entries {
                    match b.get(k, budget)? {
                        Some(y) if x.equals(y, budget)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Value::Range(a), Value::Range(b)) => {
                a.len() == b.len()
                    && (a.len() == 0 || (a.start == b.start && (a.len() == 1 || a.step == b.step)))
            }
            (Value::View(a), Value::View(b)) if a.is_set() && b.is_set() => {
                let same = self.compare(other, "==", budget)?;
                same == Some(Ordering::Equal)
            }
            (Value::View(a), Value::View(b)) => Arc::ptr_eq(a, b),
            (Value::Namespace(a), Value::Namespace(b)) => a == b,
            (Value::Function(a), Value::Function(b)) => a == b,
            (Value::Macro(a), Value::Macro(b)) => Arc::ptr_eq(a, b),
            (Value::Iter(a), Value::Iter(b)) => Arc::ptr_eq(a, b),
            (Value::Float(_), _) | (_, Value::Float(_)) => {
                match (self.as_float(), other.as_float()) {
                    (Some(a), Some(b)) => a == b,
                    _ => false,
                }
            }
            _ => matches!((self.as_int(), other.as_int()), (Some(a), Some(b)) if a == b),
        })
    }

    /// The order of two values, or the TypeError Python raises for `op` between their types.
    pub fn compare(&self, other: &Value, op: &str, budget: &mut Budget) -> Res<Option<Ordering>> {
        budget.steps(1)?;
        match (self, other) {
            (Value::Undefined(m), _) | (_, Value::Undefined(m)) => m.fault(),
            (Value::Str(a), Value::Str(b)) => {
                budget.steps(a.text.len().min(b.text.len()) / 64)?;
                Ok(Some(a.text.cmp(&b.text)))
            }
            (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
                for (x, y) in a.items.iter().zip(&b.items) {
                    if !x.equals(y, budget)? {
                        return x.compare(y, op, budget);
                    }
                }
                Ok(Some(a.items.len().cmp(&b.items.len())))
            }
            // Keys and items are sets: which is a part of which.
            (Value::View(a), Value::View(b)) if a.is_set() && b.is_set() => {
                let (fewer, more) = match a.items.len() <= b.items.len() {
                    true => (a, b),
                    false => (b, a),
                };
                for item in &fewer.items {
                    if !any_equal(&more.items, item, budget)? {
                        return Ok(None);
                    }
                }
                Ok(Some(a.items.len().cmp(&b.items.len())))
            }
            _ => match (
                self.as_int(),
                other.as_int(),
                self.as_float(),
                other.as_float(),
            ) {
                (Some(a), Some(b), _, _) => Ok(Some(a.cmp(&b))),
                (_, _, Some(a), Some(b)) => Ok(a.partial_cmp(&b)),
                _ => fault(format!(
                    "'{op}' not supported between instances of '{}' and '{}'",
                    self.type_name(),
                    other.type_name()
                )),
            },
        }
    }

    /// `needle in self`.
    pub fn contains(&self, needle: &Value, budget: &mut Budget) -> Res<bool> {
        match (self, needle) {
            (Value::Str(s), Value::Str(n)) => {
                budget.steps(s.text.len() / 64)?;
                Ok(s.text.contains(&*n.text))
            }
            (Value::Str(_), Value::Undefined(m)) => m.fault(),
            (Value::Str(_), n) => fault(format!(
                "'in <string>' requires string as left operand, not {}",
                n.type_name()
            )),
            (Value::Dict(d), n) => Ok(d.get(n, budget)?.is_some()),
            (Value::Undefined(_), _) => Ok(false),
            (Value::List(s) | Value::Tuple(s), n) => any_equal(&s.items, n, budget),
            (Value::View(v), n) => {
                if v.type_name == "dict_keys" {
                    // Looked up by its hash.
                    Key::of(n, budget)?;
                }
                any_equal(&v.items, n, budget)
            }
            (Value::Range(_), n) => any_equal(&self.items(budget)?, n, budget),
            (other, _) => fault(format!(
                "argument of type '{}' is not iterable",
                other.type_name()
            )),
        }
    }

    /// `str(value)`, with its origin and what it is declared.
    pub fn to_str(&self, budget: &mut Budget) -> Res<Str> {
        match self {
            Value::Str(s) => Ok(s.clone()),
            Value::Undefined(_) => Ok(Str::from("")),
            other => {
                let mut out = String::new();
                other.write_repr(&mut out, budget)?;
                Ok(Str {
                    text: out.into(),
                    markup: false,
                    origin: budget.unsure(),
                })
            }
        }
    }

    /// `str(value)`, to look at.
    pub fn to_text(&self, budget: &mut Budget) -> Res<Arc<str>> {
        Ok(self.to_str(budget)?.text)
    }

    pub fn repr(&self, budget: &mut Budget) -> Res<String> {
        let mut out = String::new();
        self.write_repr(&mut out, budget)?;
        Ok(out)
    }

    pub fn write_repr(&self, out: &mut String, budget: &mut Budget) -> Res<()> {
        budget.bytes(8)?;
        match self {
            Value::Undefined(_) => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(true) => out.push_str("True"),
            Value::Bool(false) => out.push_str("False"),
            Value::Int(i) => out.push_str(&i.to_string()),
            Value::Big(digits) => out.push_str(digits),
            Value::Float(f) => out.push_str(&float_repr(*f)),
            Value::Str(s) => {
                budget.bytes(s.text.len())?;
                match s.markup {
                    true => {
                        out.push_str("Markup(");
                        str_repr(&s.text, out);
                        out.push(')');
                    }
                    false => str_repr(&s.text, out),
                }
            }
            Value::List(s) => write_seq("[", s, "]", out, budget)?,
            Value::Tuple(s) if s.items.len() == 1 => write_seq("(", s, ",)", out, budget)?,
            Value::Tuple(s) => write_seq("(", s, ")", out, budget)?,
            Value::Dict(d) => {
                if !begin_items(Arc::as_ptr(d).addr(), budget) {
                    out.push_str("{...}");
                    return Ok(());
                }
                out.push('{');
                for (i, (key, value)) in d.entries.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    key.write_repr(out, budget)?;
                    out.push_str(": ");
                    value.write_repr(out, budget)?;
                }
                out.push('}');
                end_items(budget);
            }
            Value::View(v) => {
                out.push_str(v.type_name);
                write_items("([", &v.items, "])", out, budget)?;
            }
            Value::Range(r) if r.step == 1 => {
                out.push_str(&format!("range({}, {})", r.start, r.stop))
            }
            Value::Range(r) => out.push_str(&format!("range({}, {}, {})", r.start, r.stop, r.step)),
            Value::Loop(l) => {
                let turn = l.turn();
                let len = turn.len.unwrap_or(turn.index + 1);
                out.push_str(&format!("<LoopContext {}/{len}>", turn.index + 1));
            }
            Value::Namespace(id) => return write_namespace(*id, out, budget),
            Value::Macro(closure) => match &closure.name {
                Some(name) => out.push_str(&format!("<Macro '{name}'>")),
                None => out.push_str("<Macro anonymous>"),
            },
            Value::Iter(iter) => out.push_str(&iter.shown()),
            other => out.push_str(&format!("<{} object{NOWHERE}>", other.type_name())),
        }
        Ok(())
    }
}

fn write_namespace(id: usize, out: &mut String, budget: &mut Budget) -> Res<()> {
    if budget.printing.contains(&Printing::Namespace(id)) {
        out.push_str("<Namespace {...}>");
        return Ok(());
    }
    if budget.printing.len() > usize::from(MAX_DEPTH) {
        return fault("maximum recursion depth exceeded");
    }
    budget.printing.push(Printing::Namespace(id));
    let vars = budget.namespaces.get(id).cloned().unwrap_or_default();
    budget.bytes(vars.len() * size_of::<Value>())?;
    out.push_str("<Namespace {");
    for (i, (name, value)) in vars.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        str_repr(name, out);
        out.push_str(": ");
        value.write_repr(out, budget)?;
    }
    out.push_str("}>");
    budget.printing.pop();
    Ok(())
}

fn any_equal(items: &[Value], needle: &Value, budget: &mut Budget) -> Res<bool> {
    for item in items {
        if item.equals(needle, budget)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn write_seq(
    open: &str,
    seq: &Arc<Seq>,
    close: &str,
    out: &mut String,
    budget: &mut Budget,
) -> Res<()> {
    if !begin_items(Arc::as_ptr(seq).addr(), budget) {
        out.push_str(&format!("{open}...{}", close.trim_start_matches(',')));
        return Ok(());
    }
    write_items(open, &seq.items, close, out, budget)?;
    end_items(budget);
    Ok(())
}

/// Whether to print what lies there: not if that is being done. Only a namespace can hold what holds it.
fn begin_items(address: usize, budget: &mut Budget) -> bool {
    let this = Printing::Items(address);
    if budget.namespaces.is_empty() {
        return true;
    }
    let first = !budget.printing.contains(&this);
    if first {
        budget.printing.push(this);
    }
    first
}

fn end_items(budget: &mut Budget) {
    if !budget.namespaces.is_empty() {
        budget.printing.pop();
    }
}

fn write_items(
    open: &str,
    items: &[Value],
    close: &str,
    out: &mut String,
    budget: &mut Budget,
) -> Res<()> {
    out.push_str(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        item.write_repr(out, budget)?;
    }
    out.push_str(close);
    Ok(())
}

/// `repr(float)`: the shortest digits that read back; an exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(f: f64) -> String {
    if f.is_nan() {
        return "nan".into();
    }
    if f.is_infinite() {
        return if f > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{f:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let fixed = format!("{f}");
        return if fixed.contains('.') {
            fixed
        } else {
            fixed + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `repr(str)`, quotes chosen and unprintable characters escaped as Python does.
pub(super) fn str_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            c if is_printable(c) => out.push(c),
            c if (c as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if (c as u32) < 0x10000 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push_str(&format!("\\U{:08x}", c as u32)),
        }
    }
    out.push(quote);
}

/// str.isprintable() of one character. Rust's debug escapes rest on the same categories, but a
/// combining mark at the start of a string is escaped too: hence the letter before it.
pub(super) fn is_printable(c: char) -> bool {
    let mut buffer = [0; 5];
    buffer[0] = b'a';
    let len = 1 + c.encode_utf8(&mut buffer[1..]).len();
    let Ok(text) = std::str::from_utf8(&buffer[..len]) else {
        return false;
    };
    text.escape_debug().nth(1) == Some(c) || matches!(c, '"' | '\'' | '\\')
}

/// HTML escaping as markupsafe does it.
pub(super) fn html_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}
