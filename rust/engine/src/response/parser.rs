//! Reads calls and thoughts out of a turn's text as it comes. What it gives never depends on how the text was
//! cut, and no text is lost: what only looked like a call comes out as text.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use super::literal::{Span, literal};
use super::{Arguments, CallDelta, Kind, QUOTE, Style, Tags, Thinking, Tool};

/// The longest beginning of a call, in bytes, before it counts as text.
const LONGEST_HEAD: usize = 16 << 10;
/// Newlines that belong to a thought's closing marker.
const NEWLINES_BEHIND: u8 = 2;
/// Letters of an id.
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// What a piece of text turned out to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parsed {
    pub text: String,
    pub reasoning: String,
    pub calls: Vec<CallDelta>,
}

/// Reads one turn: push its text as it comes, then finish.
#[derive(Debug)]
pub struct Parser {
    style: &'static Style,
    calls: bool,
    tools: Vec<(String, Vec<(String, Kind)>)>,
    /// What may open a call amid text.
    openers: Vec<String>,
    /// What is dropped: anywhere in harmony, else only right after a call.
    drops: Vec<&'static str>,
    /// What closes each call, in order; each may be missing.
    ends: Vec<&'static str>,
    state: State,
    /// Text not yet understood.
    held: String,
    /// Only white space came since the turn began, or the last call ended.
    fresh: bool,
    /// Calls so far.
    count: usize,
    hasher: RandomState,
}

#[derive(Debug)]
enum State {
    /// A thought may begin.
    Start,
    Thought {
        begun: bool,
    },
    /// This many newlines may still be dropped.
    Behind(u8),
    Text,
    /// What is held opens with a marker; `item`: with the comma of a list.
    Head {
        item: bool,
    },
    Arguments(Reader),
    /// The rest of the object that the arguments are a member of.
    Envelope,
    /// This one of the closing markers comes next.
    End(usize),
    /// Another item of the list, or its end.
    List,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Again,
    Wait,
}

/// How much of a pattern is there.
#[derive(Debug, PartialEq, Eq)]
enum Match {
    Need,
    No,
    At(usize),
}

/// What the beginning of a call turned out to be.
enum Head {
    Need,
    Fail,
    /// The arguments follow behind so many bytes.
    Open(String, usize),
    /// The whole object has been read, and its arguments as they stand there.
    Whole(String, Option<String>, usize),
}

impl Parser {
    pub(super) fn new(
        style: &'static Style,
        tools: &[Tool],
        calls: bool,
        thinking: Thinking,
    ) -> Self {
        let state = match (thinking, style.thought) {
            (Thinking::Begun, Some(_)) => State::Thought { begun: false },
            (Thinking::Possible, Some(_)) if !style.channels => State::Start,
            _ => State::Text,
        };
        let words = |text: &'static str| -> Vec<&'static str> { text.split_whitespace().collect() };
        let drops = match style.channels {
            true => vec!["<|end|>", "<|return|>", "<|call|>"],
            false => words(style.close.trim_start_matches(']')),
        };
        let ends = match style.arguments {
            Arguments::Envelope => words(style.end.trim_start_matches('}')),
            _ => words(style.end),
        };
        Self {
            style,
            calls,
            tools: tools.iter().map(typed).collect(),
            openers: openers(style, tools),
            drops,
            ends,
            state,
            held: String::new(),
            fresh: true,
            count: 0,
            hasher: RandomState::new(),
        }
    }

    /// What `text` adds to the turn.
    pub fn push(&mut self, text: &str) -> Parsed {
        let mut out = Parsed::default();
        self.held.push_str(text);
        while self.step(&mut out) == Step::Again {}
        out
    }

    /// What was held back, now that nothing more comes.
    pub fn finish(&mut self) -> Parsed {
        let mut out = Parsed::default();
        loop {
            while self.step(&mut out) == Step::Again {}
            if matches!(self.state, State::Head { .. }) {
                self.fail(&mut out);
                continue;
            }
            let held = std::mem::take(&mut self.held);
            match std::mem::replace(&mut self.state, State::Text) {
                State::Thought { .. } => out.reasoning.push_str(&held),
                State::Arguments(mut reader) => {
                    let rest = reader.cut_short(&held);
                    self.arguments(&mut out, rest);
                }
                State::Start | State::Text if !(self.count > 0 && held.trim().is_empty()) => {
                    out.text.push_str(&held);
                }
                // White space, and closing marks cut short.
                _ => {}
            }
            return out;
        }
    }

    /// Whether any call began so far.
    pub fn called(&self) -> bool {
        self.count > 0
    }

    fn step(&mut self, out: &mut Parsed) -> Step {
        match &mut self.state {
            State::Start => self.start(),
            State::Thought { .. } => self.thought(out),
            State::Behind(_) => self.behind(),
            State::Text if self.style.channels => self.message(out),
            State::Text => self.text(out),
            State::Head { item } => {
                let item = *item;
                self.head(out, item)
            }
            State::Arguments(reader) => {
                let mut piece = String::new();
                let done = reader.read(&mut self.held, &mut piece);
                self.arguments(out, piece);
                if !done {
                    return Step::Wait;
                }
                self.state = match self.style.arguments {
                    Arguments::Envelope => State::Envelope,
                    _ => State::End(0),
                };
                Step::Again
            }
            State::Envelope => self.envelope(),
            State::End(at) => {
                let at = *at;
                self.end(at)
            }
            State::List => self.list(),
        }
    }

    fn start(&mut self) -> Step {
        let Some((open, _)) = self.style.thought else {
            self.state = State::Text;
            return Step::Again;
        };
        let rest = self.held.trim_start();
        if let Some(thought) = rest.strip_prefix(open) {
            self.held = thought.to_string();
            self.state = State::Thought { begun: false };
        } else if open.starts_with(rest) {
            return Step::Wait;
        } else {
            self.state = State::Text;
        }
        Step::Again
    }

    fn thought(&mut self, out: &mut Parsed) -> Step {
        if self.held.is_empty() {
            return Step::Wait;
        }
        if let State::Thought { begun } = &mut self.state
            && !*begun
        {
            *begun = true;
            if self.held.starts_with('\n') {
                self.held.drain(..1);
            }
        }
        let close = self.style.thought.map_or("", |(_, close)| close);
        if let Some(at) = self.held.find(close) {
            let thought = &self.held[..at];
            out.reasoning
                .push_str(thought.strip_suffix('\n').unwrap_or(thought));
            self.held.drain(..at + close.len());
            self.state = match self.style.channels {
                true => State::Text,
                false => State::Behind(NEWLINES_BEHIND),
            };
            return Step::Again;
        }
        let mut sure = self.held.len() - overlap(&self.held, close);
        if self.held[..sure].ends_with('\n') {
            sure -= 1;
        }
        out.reasoning.extend(self.held.drain(..sure));
        Step::Wait
    }

    fn behind(&mut self) -> Step {
        let State::Behind(left) = &mut self.state else {
            return Step::Wait;
        };
        if self.held.is_empty() {
            return Step::Wait;
        }
        if *left > 0 && self.held.starts_with('\n') {
            *left -= 1;
            self.held.drain(..1);
        } else {
            self.state = State::Text;
        }
        Step::Again
    }

    fn text(&mut self, out: &mut Parsed) -> Step {
        if !self.calls {
            out.text.push_str(&self.held);
            self.held.clear();
            return Step::Wait;
        }
        // White space is of no use between calls, and says nothing yet where a call needs no marker.
        let bare = self.fresh && self.style.bare;
        let mut lead = 0;
        if bare || (self.fresh && self.called()) {
            lead = self.held.len() - self.held.trim_start().len();
        }
        let rest = &self.held[lead..];
        if rest.is_empty() {
            return Step::Wait;
        }
        if self.fresh && self.called() {
            for drop in &self.drops {
                if rest.starts_with(drop) {
                    self.held.drain(..lead + drop.len());
                    return Step::Again;
                }
                if drop.starts_with(rest) {
                    return Step::Wait;
                }
            }
        }
        let first = if self.style.open.is_empty() { '{' } else { '[' };
        let begins = bare && rest.starts_with(first);
        let found = self.openers.iter().filter_map(|o| rest.find(o)).min();
        if let Some(at) = if begins { Some(0) } else { found } {
            if at > 0 || !self.called() {
                out.text.push_str(&self.held[..lead + at]);
            }
            self.held.drain(..lead + at);
            self.state = State::Head { item: false };
            return Step::Again;
        }
        let held = self.openers.iter().map(|o| overlap(rest, o)).max();
        let sure = rest.len() - held.unwrap_or(0);
        if sure > 0 {
            out.text.extend(self.held.drain(..lead + sure));
            self.fresh = false;
        }
        Step::Wait
    }

    /// Text in harmony: messages, each with a head that says whom it is for.
    fn message(&mut self, out: &mut Parsed) -> Step {
        let rest = self.held.trim_start();
        // The prompt ends where the first message's head may name its recipient.
        if self.fresh && !self.called() {
            if rest.is_empty() || "to=".starts_with(rest) {
                return Step::Wait;
            }
            if rest.starts_with("to=") {
                self.state = State::Head { item: false };
                return Step::Again;
            }
        }
        let openers = self.openers.iter().map(String::as_str);
        let markers: Vec<&str> = openers.chain(self.drops.iter().copied()).collect();
        let found = markers
            .iter()
            .filter_map(|marker| Some((self.held.find(marker)?, *marker)))
            .min();
        let Some((at, marker)) = found else {
            let held = markers.iter().map(|m| overlap(&self.held, m)).max();
            let sure = self.held.len() - held.unwrap_or(0);
            if sure > 0 {
                self.plain(out, sure);
            }
            return Step::Wait;
        };
        let (size, drops) = (marker.len(), self.drops.contains(&marker));
        if at > 0 {
            self.plain(out, at);
        }
        if drops {
            self.held.drain(..size);
        } else {
            self.state = State::Head { item: false };
        }
        Step::Again
    }

    /// So many bytes are text, unless they are white space behind a call.
    fn plain(&mut self, out: &mut Parsed, size: usize) {
        let text: String = self.held.drain(..size).collect();
        if !(self.fresh && self.called() && text.trim().is_empty()) {
            out.text.push_str(&text);
            self.fresh = false;
        }
    }

    fn head(&mut self, out: &mut Parsed, item: bool) -> Step {
        if self.style.channels {
            return self.channel(out);
        }
        let seen = floor(&self.held, LONGEST_HEAD);
        let head = match self.style.arguments {
            Arguments::Envelope => self.object_head(&self.held[..seen], item),
            _ => self.plain_head(&self.held[..seen], item),
        };
        match head {
            Head::Need if seen == self.held.len() => return Step::Wait,
            Head::Need | Head::Fail => self.fail(out),
            Head::Open(name, used) => {
                self.held.drain(..used);
                self.begin(out, name);
            }
            Head::Whole(name, arguments, used) => {
                self.held.drain(..used);
                self.begin(out, name);
                let mut text = arguments.unwrap_or_default();
                // Some write the arguments as a string of JSON.
                if let Ok(inner) = serde_json::from_str::<String>(&text) {
                    text = inner;
                }
                if text.is_empty() || text == "null" {
                    text = "{}".into();
                }
                self.arguments(out, text);
                self.state = State::End(0);
            }
        }
        Step::Again
    }

    /// What looked like a call is text: its first character, and the rest is looked at again.
    fn fail(&mut self, out: &mut Parsed) {
        let first = self.held.chars().next().map_or(0, char::len_utf8);
        out.text.extend(self.held.drain(..first));
        self.fresh = false;
        self.state = State::Text;
    }

    fn begin(&mut self, out: &mut Parsed, name: String) {
        let kinds = self.tools.iter().find(|(known, _)| *known == name);
        let kinds = kinds.map(|(_, kinds)| kinds.clone()).unwrap_or_default();
        self.state = State::Arguments(Reader::new(self.style, kinds));
        let index = self.count;
        self.count += 1;
        self.fresh = true;
        out.calls.push(CallDelta {
            index,
            id: Some(self.id(index)),
            name: Some(name),
            arguments: String::new(),
        });
    }

    fn arguments(&mut self, out: &mut Parsed, piece: String) {
        if piece.is_empty() {
            return;
        }
        let index = self.count.saturating_sub(1);
        match out.calls.last_mut() {
            Some(call) if call.index == index => call.arguments.push_str(&piece),
            _ => out.calls.push(CallDelta {
                index,
                arguments: piece,
                ..CallDelta::default()
            }),
        }
    }

    /// Keys that the process drew at random make ids hard to meet again, here or elsewhere.
    fn id(&self, index: usize) -> String {
        const SHORT: usize = 9;
        let letters = |part: u8| -> String {
            let mut number = self.hasher.hash_one((index, part));
            (0..SHORT)
                .map(|_| {
                    let letter = ALPHABET[(number % 62) as usize];
                    number /= 62;
                    char::from(letter)
                })
                .collect()
        };
        match self.style.short_ids {
            true => letters(0),
            false => format!("call_{}{}", letters(0), letters(1)),
        }
    }

    /// A head outside of any object: `open` `before` name `after`.
    fn plain_head(&self, text: &str, item: bool) -> Head {
        let whole = [self.style.open, self.style.before].concat();
        let next = [",", self.style.before].concat();
        let patterns = match item {
            true => vec![next.as_str()],
            false => vec![whole.as_str(), self.style.before],
        };
        let mut need = false;
        for pattern in patterns {
            if pattern.is_empty() {
                continue;
            }
            let at = match flexible(text, pattern) {
                Match::At(at) => at,
                Match::Need => {
                    need = true;
                    continue;
                }
                Match::No => continue,
            };
            match self.named_head(text, at) {
                Head::Need => need = true,
                Head::Fail => {}
                head => return head,
            }
        }
        if need { Head::Need } else { Head::Fail }
    }

    fn named_head(&self, text: &str, at: usize) -> Head {
        let start = at + text[at..].len() - text[at..].trim_start().len();
        let rest = &text[start..];
        let stop = |c: char| c.is_whitespace() || "<>[](){}\"'=,`|".contains(c);
        let Some(length) = rest.find(stop) else {
            return Head::Need;
        };
        if length == 0 {
            return Head::Fail;
        }
        match flexible(&rest[length..], self.style.after.trim_end()) {
            Match::At(used) => Head::Open(rest[..length].to_string(), start + length + used),
            Match::Need => Head::Need,
            Match::No => Head::Fail,
        }
    }

    /// A head inside of an object: `open` `{"name": name, "arguments":`, in any order.
    fn object_head(&self, text: &str, item: bool) -> Head {
        let opening = [self.style.open, self.style.before].concat();
        let opening = opening
            .split_once('{')
            .map_or(opening.as_str(), |(head, _)| head);
        let lead = self.style.lead;
        let at = match item {
            true => 1,
            false if !lead.is_empty() && text.starts_with(lead) => lead.len(),
            false => match flexible(text, opening.trim_end()) {
                Match::At(at) => at,
                Match::Need => return Head::Need,
                Match::No => return Head::Fail,
            },
        };
        self.object(text, at)
    }

    fn object(&self, text: &str, at: usize) -> Head {
        // The name comes before the arguments as a rule; where it does not, they wait for it.
        let mut cursor = Cursor { text, at };
        let (mut name, mut arguments): (Option<String>, Option<String>) = (None, None);
        match cursor.next() {
            None => return Head::Need,
            Some('{') => cursor.at += 1,
            Some(_) => return Head::Fail,
        }
        loop {
            match cursor.next() {
                None => return Head::Need,
                Some('}') => break,
                Some(',') if name.is_some() || arguments.is_some() => cursor.at += 1,
                Some('"') => {}
                Some(_) if cursor.at > 0 => return Head::Fail,
                Some(_) => {}
            }
            if cursor.next() == Some('}') {
                break;
            }
            let Some(key) = cursor.value() else {
                return Head::Need;
            };
            let Ok(key) = serde_json::from_str::<String>(key) else {
                return Head::Fail;
            };
            match cursor.next() {
                None => return Head::Need,
                Some(':') => cursor.at += 1,
                Some(_) => return Head::Fail,
            }
            let Some(first) = cursor.next() else {
                return Head::Need;
            };
            let wanted = key == "arguments" || key == "parameters";
            if wanted && first == '{' && name.is_some() && arguments.is_none() {
                return Head::Open(name.unwrap_or_default(), cursor.at);
            }
            if self.style.bare && !(wanted || ["name", "type", "id"].contains(&key.as_str())) {
                return Head::Fail;
            }
            let Some(value) = cursor.value() else {
                return Head::Need;
            };
            match key.as_str() {
                "name" => match serde_json::from_str::<String>(value) {
                    Ok(text) if !text.is_empty() => name = Some(text),
                    _ => return Head::Fail,
                },
                _ if wanted => arguments = Some(value.to_string()),
                _ => {}
            }
            match cursor.next() {
                None => return Head::Need,
                Some('}') => break,
                Some(',') => cursor.at += 1,
                Some(_) => return Head::Fail,
            }
        }
        let Some(name) = name else {
            return Head::Fail;
        };
        let known = self.tools.iter().any(|(tool, _)| *tool == name);
        if self.style.bare && arguments.is_none() && !known {
            return Head::Fail;
        }
        Head::Whole(name, arguments, cursor.at + 1)
    }

    /// The head of a message in harmony: a channel, a recipient, the type of its content.
    fn channel(&mut self, out: &mut Parsed) -> Step {
        const MESSAGE: &str = "<|message|>";
        const LONGEST: usize = 1 << 10;
        let seen = floor(&self.held, LONGEST);
        let Some(at) = self.held[..seen].find(MESSAGE) else {
            if seen == self.held.len() {
                return Step::Wait;
            }
            self.fail(out);
            return Step::Again;
        };
        let head: String = self.held.drain(..at + MESSAGE.len()).collect();
        let word = |key: &str| -> Option<String> {
            let (_, rest) = head.split_once(key)?;
            let end = rest.find(|c: char| c.is_whitespace() || c == '<');
            Some(rest[..end.unwrap_or(rest.len())].to_string())
        };
        let recipient = word("to=").filter(|name| !name.is_empty() && self.calls);
        if let Some(name) = recipient {
            self.begin(out, name.trim_start_matches("functions.").to_string());
        } else if word("<|channel|>").as_deref() == Some("analysis") {
            self.state = State::Thought { begun: false };
            self.fresh = false;
        } else {
            self.state = State::Text;
            self.fresh = false;
        }
        Step::Again
    }

    fn envelope(&mut self) -> Step {
        let rest = self.held.trim_start();
        match rest.chars().next() {
            None => return Step::Wait,
            Some('}') => {
                self.held = rest[1..].to_string();
            }
            Some(',') => {
                let seen = floor(rest, LONGEST_HEAD);
                let mut span = Span::new();
                match span.end(&rest[..seen], "}") {
                    Some(at) => self.held = rest[at + 1..].to_string(),
                    None if seen == rest.len() => return Step::Wait,
                    None => {}
                }
            }
            Some(_) => {}
        }
        self.state = State::End(0);
        Step::Again
    }

    fn end(&mut self, at: usize) -> Step {
        let Some(marker) = self.ends.get(at) else {
            self.state = match self.style.is_list() {
                true => State::List,
                false => State::Text,
            };
            return Step::Again;
        };
        let rest = self.held.trim_start();
        if let Some(rest) = rest.strip_prefix(marker) {
            self.held = rest.to_string();
        } else if marker.starts_with(rest) {
            return Step::Wait;
        }
        self.state = State::End(at + 1);
        Step::Again
    }

    fn list(&mut self) -> Step {
        let rest = self.held.trim_start();
        self.state = match rest.chars().next() {
            None => return Step::Wait,
            Some(',') => {
                self.held = rest.to_string();
                State::Head { item: true }
            }
            Some(']') => {
                self.held = rest[1..].to_string();
                State::Text
            }
            Some(_) => State::Text,
        };
        Step::Again
    }
}

fn typed(tool: &Tool) -> (String, Vec<(String, Kind)>) {
    let properties = tool.parameters.get("properties");
    let properties = properties.and_then(|p| p.as_object());
    let kinds = properties
        .into_iter()
        .flatten()
        .map(|(key, schema)| (key.clone(), Kind::of(schema, &tool.parameters)))
        .collect();
    (tool.name.clone(), kinds)
}

fn openers(style: &Style, tools: &[Tool]) -> Vec<String> {
    if style.channels {
        return vec!["<|channel|>".into(), "<|start|>".into()];
    }
    let mut openers = Vec::new();
    if style.trigger.is_empty() {
        for tool in tools {
            openers.push([style.open, &tool.name, style.after].concat());
        }
    } else {
        openers.push(style.trigger.trim_end().to_string());
    }
    if !style.lead.is_empty() {
        openers.push(style.lead.to_string());
    }
    // DeepSeek's calls have markers of their own inside the section's.
    if style.name.starts_with("deepseek") {
        openers.push("<｜tool▁call▁begin｜>".into());
    }
    openers
}

/// Reads the arguments of one call into JSON.
#[derive(Debug)]
struct Reader {
    form: Arguments,
    kinds: Vec<(String, Kind)>,
    stage: Stage,
    /// Arguments written so far.
    written: usize,
}

#[derive(Debug)]
enum Stage {
    /// A JSON object not yet begun, or as deep as this.
    Json(Span),
    /// The next name, or the end.
    Key,
    /// A value, the first newline of which may still be dropped.
    Value { kind: Kind, trim: bool, text: bool },
    /// A value written as a literal.
    Literal(Span),
    /// A string in Gemma's quotes.
    Quoted,
}

impl Reader {
    fn new(style: &Style, kinds: Vec<(String, Kind)>) -> Self {
        let json = matches!(style.arguments, Arguments::Json | Arguments::Envelope);
        Self {
            form: style.arguments,
            kinds,
            stage: if json {
                Stage::Json(Span::new())
            } else {
                Stage::Key
            },
            written: 0,
        }
    }

    /// Takes what it can of `held`; true when the arguments are over.
    fn read(&mut self, held: &mut String, out: &mut String) -> bool {
        loop {
            let done = match &mut self.stage {
                Stage::Json(_) => return self.json(held, out),
                Stage::Key => match self.key(held, out) {
                    Key::Need => return false,
                    Key::Over => {
                        out.push_str(if self.written == 0 { "{}" } else { "}" });
                        return true;
                    }
                    Key::Value => true,
                },
                Stage::Value { .. } => self.value(held, out),
                Stage::Literal(_) => self.literal(held, out),
                Stage::Quoted => self.quoted(held, out),
            };
            if !done {
                return false;
            }
        }
    }

    /// What can still be said when the text ends amid the arguments.
    fn cut_short(&mut self, held: &str) -> String {
        match &self.stage {
            Stage::Json(_) => held.to_string(),
            Stage::Key => String::new(),
            Stage::Value { text: true, .. } | Stage::Quoted => inner(held),
            Stage::Value { .. } | Stage::Literal(_) => held.to_string(),
        }
    }

    fn json(&mut self, held: &mut String, out: &mut String) -> bool {
        let Stage::Json(span) = &mut self.stage else {
            return true;
        };
        if self.written == 0 {
            let lead = held.len() - held.trim_start().len();
            held.drain(..lead);
            match held.chars().next() {
                None => return false,
                Some('{') => self.written = 1,
                Some(_) => {
                    out.push_str("{}");
                    return true;
                }
            }
        }
        match span.whole(held) {
            Some(end) => {
                out.extend(held.drain(..end));
                true
            }
            None => {
                out.push_str(held);
                held.clear();
                span.restart();
                false
            }
        }
    }

    fn key(&mut self, held: &mut String, out: &mut String) -> Key {
        match self.form {
            Arguments::Tagged(tags) => self.tagged_key(tags, held, out),
            _ => self.word_key(held, out),
        }
    }

    fn tagged_key(&mut self, tags: Tags, held: &mut String, out: &mut String) -> Key {
        let rest = held.trim_start();
        let lead = held.len() - rest.len();
        let Some(rest) = rest.strip_prefix(tags.key.0) else {
            return match tags.key.0.starts_with(rest) {
                true => Key::Need,
                false => Key::Over,
            };
        };
        let stop = tags.key.1.chars().next().unwrap_or('>');
        let seen = floor(rest, LONGEST_HEAD);
        let (length, used) = match rest[..seen].find(stop) {
            None if seen == rest.len() => return Key::Need,
            None => return Key::Over,
            Some(length) => match flexible(&rest[length..], tags.key.1.trim_end()) {
                Match::Need => return Key::Need,
                Match::No => return Key::Over,
                Match::At(used) => (length, used),
            },
        };
        let key = rest[..length].trim().to_string();
        held.drain(..lead + tags.key.0.len() + length + used);
        let kind = self.begin(&key, out);
        let text = kind == Kind::Text;
        if text {
            out.push('"');
        }
        self.stage = Stage::Value {
            kind,
            trim: tags.value.0 == "\n",
            text,
        };
        Key::Value
    }

    /// `key=` or `key:`, behind a comma or not.
    fn word_key(&mut self, held: &mut String, out: &mut String) -> Key {
        let sign = if self.form == Arguments::Gemma {
            ':'
        } else {
            '='
        };
        let mut rest = held.trim_start();
        if self.written > 0
            && let Some(behind) = rest.strip_prefix(',')
        {
            rest = behind.trim_start();
        }
        let seen = floor(rest, LONGEST_HEAD);
        let stop = |c: char| c == sign || "(){}[]<,'".contains(c);
        let Some(length) = rest[..seen].find(stop) else {
            return match seen == rest.len() {
                true => Key::Need,
                false => Key::Over,
            };
        };
        let key = rest[..length].trim().trim_matches('"').to_string();
        if key.is_empty() || !rest[length..].starts_with(sign) {
            // Only a comma before the end is dropped with it.
            if rest.starts_with([')', '}']) {
                *held = rest.to_string();
            }
            return Key::Over;
        }
        let behind = rest[length + sign.len_utf8()..].trim_start();
        let gemma = self.form == Arguments::Gemma;
        if behind.is_empty() || (gemma && QUOTE.starts_with(behind) && behind != QUOTE) {
            return Key::Need;
        }
        let quoted = gemma && behind.starts_with(QUOTE);
        let behind = if quoted {
            behind[QUOTE.len()..].to_string()
        } else {
            behind.to_string()
        };
        *held = behind;
        self.begin(&key, out);
        self.stage = if quoted {
            out.push('"');
            Stage::Quoted
        } else {
            Stage::Literal(Span::new())
        };
        Key::Value
    }

    fn begin(&mut self, key: &str, out: &mut String) -> Kind {
        out.push_str(if self.written == 0 { "{" } else { ", " });
        self.written += 1;
        out.push('"');
        out.push_str(&inner(key));
        out.push_str("\": ");
        let known = self.kinds.iter().find(|(name, _)| name == key);
        known.map_or(Kind::Mixed(Vec::new()), |(_, kind)| kind.clone())
    }

    fn value(&mut self, held: &mut String, out: &mut String) -> bool {
        let (Arguments::Tagged(tags), Stage::Value { kind, trim, text }) =
            (self.form, &mut self.stage)
        else {
            return true;
        };
        let (before, close, _) = tags.value;
        if *trim && !held.is_empty() {
            *trim = false;
            if held.starts_with('\n') {
                held.drain(..1);
            }
        }
        let Some(at) = held.find(close) else {
            if *text {
                let mut sure = held.len() - overlap(held, close);
                if !before.is_empty() && held[..sure].ends_with(before) {
                    sure -= before.len();
                }
                out.push_str(&inner(&held[..sure]));
                held.drain(..sure);
            }
            return false;
        };
        let raw = held[..at].strip_suffix(before).unwrap_or(&held[..at]);
        if *text {
            out.push_str(&inner(raw));
            out.push('"');
        } else {
            out.push_str(&of_kind(raw, kind));
        }
        held.drain(..at + close.len());
        self.stage = Stage::Key;
        true
    }

    fn literal(&mut self, held: &mut String, out: &mut String) -> bool {
        let Stage::Literal(span) = &mut self.stage else {
            return true;
        };
        let close = if self.form == Arguments::Gemma {
            ",}"
        } else {
            ",)"
        };
        let Some(at) = span.end(held, close) else {
            return false;
        };
        let raw = held[..at].trim();
        match literal(raw) {
            Some(json) => out.push_str(&json),
            None => out.push_str(&quote(raw)),
        }
        held.drain(..at);
        self.stage = Stage::Key;
        true
    }

    fn quoted(&mut self, held: &mut String, out: &mut String) -> bool {
        if let Some(at) = held.find(QUOTE) {
            out.push_str(&inner(&held[..at]));
            out.push('"');
            held.drain(..at + QUOTE.len());
            self.stage = Stage::Key;
            return true;
        }
        let sure = held.len() - overlap(held, QUOTE);
        out.push_str(&inner(&held[..sure]));
        held.drain(..sure);
        false
    }
}

/// What stands where an argument's name may.
enum Key {
    Need,
    Over,
    Value,
}

/// A raw value as JSON of the kind its schema asks for, else as a string.
fn of_kind(raw: &str, kind: &Kind) -> String {
    let plain = raw.trim();
    let json = match serde_json::from_str::<serde_json::Value>(plain) {
        Ok(_) => Some(plain.to_string()),
        Err(_) if matches!(plain, "True" | "False" | "None") || *kind == Kind::Json => {
            literal(plain)
        }
        Err(_) => None,
    };
    let Some(json) = json else {
        return quote(raw);
    };
    let fits = match kind {
        Kind::Text => false,
        Kind::Json => true,
        Kind::Mixed(types) if types.is_empty() => !json.starts_with('"'),
        Kind::Mixed(types) => {
            let found = match json.as_bytes().first() {
                Some(b'{') => "object",
                Some(b'[') => "array",
                Some(b'"') => "string",
                Some(b't' | b'f') => "boolean",
                Some(b'n') => "null",
                _ => "number",
            };
            types.iter().any(|name| {
                name == found || (name == "integer" && found == "number" && !json.contains(['.']))
            })
        }
    };
    if fits { json } else { quote(raw) }
}

/// A JSON string.
pub(super) fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A JSON string without its quotes.
fn inner(text: &str) -> String {
    let quoted = quote(text);
    quoted[1..quoted.len() - 1].to_string()
}

/// The length of the longest end of `text` that `marker` may go on from.
fn overlap(text: &str, marker: &str) -> usize {
    let longest = marker.len().saturating_sub(1).min(text.len());
    (1..=longest)
        .rev()
        .find(|&n| marker.is_char_boundary(n) && text.as_bytes().ends_with(&marker.as_bytes()[..n]))
        .unwrap_or(0)
}

/// The largest place at or before `at` where `text` may be cut.
pub(super) fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Whether `text` begins with `pattern`, where white space of the pattern stands for any, or none.
fn flexible(text: &str, pattern: &str) -> Match {
    let mut rest = text;
    for wanted in pattern.chars() {
        if wanted.is_whitespace() || "[{,".contains(wanted) {
            rest = rest.trim_start();
        }
        if wanted.is_whitespace() {
            continue;
        }
        match rest.chars().next() {
            None => return Match::Need,
            Some(c) if c == wanted => rest = &rest[c.len_utf8()..],
            Some(_) => return Match::No,
        }
    }
    Match::At(text.len() - rest.len())
}

/// A place in JSON text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next character that is no white space, where the cursor then stands.
    fn next(&mut self) -> Option<char> {
        let rest = self.text.get(self.at..)?;
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    /// The value here, behind which the cursor then stands; none while its end is not to be seen.
    fn value(&mut self) -> Option<&'a str> {
        let rest = &self.text[self.at..];
        let end = match rest.chars().next()? {
            '"' | '{' | '[' => Span::new().whole(rest)?,
            _ => rest.find(|c: char| c.is_whitespace() || ",:}]<".contains(c))?,
        };
        self.at += end;
        Some(&rest[..end])
    }
}
