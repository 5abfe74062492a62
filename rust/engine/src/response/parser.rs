//! Reads calls and thoughts out of a turn's text as it comes. What it gives never depends on how the text was
//! cut, and no text is lost: what only looked like a call comes out as text.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use super::arguments::Reader;
use super::head::Head;
use super::literal::Span;
use super::{Arguments, CallDelta, Kind, Style, Thinking, Tool};

/// The longest beginning of a call, in bytes, before it counts as text.
pub(super) const LONGEST_HEAD: usize = 16 << 10;
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
    pub(super) style: &'static Style,
    calls: bool,
    pub(super) tools: Vec<(String, Vec<(String, Kind)>)>,
    /// What may open a call amid text.
    openers: Vec<String>,
    /// What closes a turn of calls, and is dropped right after one.
    drops: Vec<&'static str>,
    /// What opens a call right after another one, besides.
    next: &'static str,
    /// Thoughts are told from the rest.
    splits: bool,
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
        let drops = words(style.close.trim_start().trim_start_matches(']'));
        let section = !style.open.is_empty() && !style.is_list();
        let ends = match style.arguments {
            Arguments::Envelope => words(style.end.trim_start_matches('}')),
            _ => words(style.end),
        };
        Self {
            style,
            calls,
            tools: tools.iter().map(typed).collect(),
            openers: if calls || style.channels {
                openers(style, tools)
            } else {
                Vec::new()
            },
            drops,
            next: if section { style.before } else { "" },
            splits: style.channels || !matches!(state, State::Text),
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

    /// Whether thoughts are told from the rest.
    pub fn splits_thoughts(&self) -> bool {
        self.splits
    }

    /// Whether a thought is under way.
    pub fn in_thought(&self) -> bool {
        matches!(self.state, State::Thought { .. })
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
        // White space is of no use between calls, and says nothing yet where a call needs no marker.
        let bare = self.calls && self.fresh && self.style.bare;
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
            if !self.next.is_empty() && rest.starts_with(self.next) {
                self.held.drain(..lead);
                self.state = State::Head { item: false };
                return Step::Again;
            }
            if self.next.starts_with(rest) {
                return Step::Wait;
            }
        }
        let first = if self.style.open.is_empty() { '{' } else { '[' };
        let begins = bare && rest.starts_with(first);
        let found = self.openers.iter().filter_map(|o| rest.find(o)).min();
        let found = if begins { Some(0) } else { found };
        let frame = self.style.frame.iter();
        let frame = frame
            .filter_map(|mark| Some((rest.find(mark)?, mark.len())))
            .min();
        if let Some((at, size)) = frame.filter(|(at, _)| found.is_none_or(|found| *at < found)) {
            if at > 0 || !self.called() {
                out.text.push_str(&self.held[..lead + at]);
            }
            self.fresh &= self.held[..lead + at].trim().is_empty();
            self.held.drain(..lead + at + size);
            return Step::Again;
        }
        if let Some(at) = found {
            if at > 0 || !self.called() {
                out.text.push_str(&self.held[..lead + at]);
            }
            self.held.drain(..lead + at);
            self.state = State::Head { item: false };
            return Step::Again;
        }
        let openers = self.openers.iter().map(String::as_str);
        let markers = openers.chain(self.style.frame.iter().copied());
        let held = markers.map(|marker| overlap(rest, marker)).max();
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
        let markers: Vec<&str> = openers.chain(self.style.frame.iter().copied()).collect();
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
        let (size, drops) = (marker.len(), self.style.frame.contains(&marker));
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
    // DeepSeek's calls have markers of their own inside the section's, and may do without that.
    const CALL: &str = "<｜tool▁call▁begin｜>";
    if style.before.starts_with(CALL) {
        openers.push(CALL.into());
    }
    openers
}

/// The length of the longest end of `text` that `marker` may go on from.
pub(super) fn overlap(text: &str, marker: &str) -> usize {
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
