//! Regular expressions that cut text into words, for the kind tokenizers use: alternatives of character
//! sets with greedy repeats, and a look at the next character. Anything else is refused, not guessed.

use regex_syntax::hir::{Class, ClassUnicode, HirKind};

/// Sets per pattern: one bit each.
const MAX_SETS: usize = 32;
/// Alternatives at the top of a pattern: one bit each.
const MAX_BRANCHES: usize = 32;
/// Longer patterns and deeper groups are not read.
const MAX_PATTERN: usize = 16 << 10;
const MAX_DEPTH: usize = 8;

/// A pattern whose matches and gaps are a text's words.
#[derive(Debug)]
pub(super) struct Pattern {
    sets: Sets,
    branches: Vec<Branch>,
    /// The branches that can begin with an ASCII character.
    ascii: Vec<u32>,
    /// By set: the sets of what a match may have behind a character of it, on any way that is tried.
    follow: [u32; MAX_SETS],
    /// The same of ASCII characters, and whether each is a match even if alone.
    edges: Vec<(u32, bool)>,
}

#[derive(Debug)]
struct Branch {
    items: Vec<Item>,
    /// The sets its first character may be of.
    first: u32,
    /// A set of which one character is a match, unless it is of the other set too.
    alone: Option<(u32, u32)>,
}

#[derive(Debug, Clone)]
enum Item {
    /// `min` to `max` characters of a set, as many as can be.
    Run {
        set: u32,
        min: u32,
        max: u32,
        possessive: bool,
    },
    Group {
        branches: Vec<Vec<Item>>,
        optional: bool,
    },
    /// The next character is not of the set (`negative`), or there is one that is.
    Ahead {
        set: u32,
        negative: bool,
    },
    End,
}

/// What follows the items at hand.
struct Then<'a> {
    items: &'a [Item],
    next: Option<&'a Then<'a>>,
}

impl Pattern {
    /// Read a regular expression; `None` for one that holds more than this file knows.
    pub fn new(regex: &str) -> Option<Self> {
        Self::with(regex, false, Sets::new)
    }

    /// The same of an expression that no file holds, but the `tokenizers` crate.
    pub fn of_library(regex: &str) -> Option<Self> {
        Self::with(regex, true, Sets::new)
    }

    /// The same for text whose bytes count as the characters that `char_of` gives them.
    pub fn of_bytes(regex: &str, char_of: fn(u8) -> char) -> Option<Self> {
        Self::with(regex, false, |classes| Sets::of_bytes(classes, char_of))
    }

    /// One character of a class.
    pub fn of_class(class: ClassUnicode) -> Option<Self> {
        let item = Item::Run {
            set: 1,
            min: 1,
            max: 1,
            possessive: false,
        };
        Self::of(vec![vec![item]], Sets::new(&[class]))
    }

    fn with(regex: &str, own: bool, sets: impl FnOnce(&[ClassUnicode]) -> Sets) -> Option<Self> {
        if regex.len() > MAX_PATTERN {
            return None;
        }
        let mut parser = Parser {
            rest: regex,
            sets: Vec::new(),
            own,
        };
        let parsed = parser.alternatives(false, 0)?;
        if !parser.rest.is_empty() || parsed.len() > MAX_BRANCHES {
            return None;
        }
        Self::of(parsed, sets(&parser.sets))
    }

    fn of(parsed: Vec<Vec<Item>>, sets: Sets) -> Option<Self> {
        let branches: Vec<Branch> = parsed
            .into_iter()
            .map(|items| {
                let (first, empty) = first_of(&items);
                let alone = alone(&items);
                (!empty && steady(&items)).then_some(Branch {
                    items,
                    first,
                    alone,
                })
            })
            .collect::<Option<_>>()?;
        let mut follow = [0; MAX_SETS];
        for branch in &branches {
            note_follow(&branch.items, 0, &mut follow);
        }
        let begins = |c: &u32| {
            let can = branches
                .iter()
                .enumerate()
                .filter(|(_, b)| b.first & c != 0);
            can.fold(0, |bits, (i, _)| bits | 1 << i)
        };
        let ascii = sets.ascii.iter().map(begins).collect();
        let mut pattern = Self {
            sets,
            branches,
            ascii,
            follow,
            edges: Vec::new(),
        };
        let edges = pattern.sets.ascii.iter().map(|&sets| pattern.edge_of(sets));
        pattern.edges = edges.collect();
        Some(pattern)
    }

    fn edge_of(&self, sets: u32) -> (u32, bool) {
        let of_sets = (0..MAX_SETS).filter(|bit| sets >> bit & 1 == 1);
        let follow = of_sets.fold(0, |follow, bit| follow | self.follow[bit]);
        let alone = self.branches.iter().filter_map(|branch| branch.alone);
        let begins = alone
            .into_iter()
            .any(|(set, but)| sets & set != 0 && sets & but == 0);
        (follow, begins)
    }

    #[inline]
    fn edge(&self, text: &[u8], at: usize) -> (u32, bool) {
        match self.edges.get(text[at] as usize) {
            Some(&edge) => edge,
            None => self.edge_of(self.sets.of(text, at).0),
        }
    }

    /// Whether a word always ends at `at`, and what comes before depends on no character behind the one there:
    /// no match, nor any way that is tried on the way to one, has the characters around `at` side by side.
    /// The second value: one of them is always in a match, so that no gap goes on there.
    #[inline]
    pub fn parts(&self, text: &[u8], at: usize) -> (bool, bool) {
        let mut before = at - 1;
        while self.sets.bytes.is_none() && before > 0 && text[before] & 0xc0 == 0x80 {
            before -= 1;
        }
        let (follow, in_match) = self.edge(text, before);
        let apart = follow & self.sets.of(text, at).0 == 0;
        (apart, in_match || self.edge(text, at).1)
    }

    /// The end of the match at `at`, if there is one. A match is never empty.
    #[inline]
    fn match_at(&self, text: &[u8], at: usize) -> Option<usize> {
        let byte = *text.get(at)?;
        let mut branches = match self.ascii.get(byte as usize) {
            Some(&branches) => branches,
            None => {
                let (sets, _) = self.sets.of(text, at);
                let can = self.branches.iter().enumerate();
                can.filter(|(_, b)| b.first & sets != 0)
                    .fold(0, |bits, (i, _)| bits | 1 << i)
            }
        };
        while branches != 0 {
            let branch = branches.trailing_zeros() as usize;
            branches &= branches - 1;
            if let Some(end) = self.run(&self.branches[branch].items, text, at, None) {
                return Some(end);
            }
        }
        None
    }

    /// The next word at `at`: a match, or the gap before one (`false`). `at` is below the text's length.
    #[inline]
    pub fn next(&self, bytes: &[u8], at: usize) -> (usize, bool) {
        if let Some(end) = self.match_at(bytes, at) {
            return (end, true);
        }
        // A branch that begins with an endless run and fails, fails wherever else in that run it begins.
        let mut dead = [0; MAX_BRANCHES];
        let mut end = at;
        loop {
            if end >= bytes.len() {
                return (bytes.len(), false);
            }
            let mut found = false;
            for (branch, dead) in self.branches.iter().zip(&mut dead) {
                if *dead > end {
                    continue;
                }
                found |= self.run(&branch.items, bytes, end, None).is_some();
                if let (
                    false,
                    Some(Item::Run {
                        set, max: u32::MAX, ..
                    }),
                ) = (found, branch.items.first())
                {
                    *dead = self.sets.run(bytes, end, *set, u32::MAX).0;
                }
            }
            if found {
                return (end, false);
            }
            end += self.sets.width(bytes[end]);
        }
    }

    fn run(
        &self,
        items: &[Item],
        text: &[u8],
        at: usize,
        then: Option<&Then<'_>>,
    ) -> Option<usize> {
        let Some((item, rest)) = items.split_first() else {
            return match then {
                Some(then) => self.run(then.items, text, at, then.next),
                None => Some(at),
            };
        };
        match item {
            Item::Run {
                set,
                min,
                max,
                possessive,
            } => {
                let (mut end, mut count) = self.sets.run(text, at, *set, *max);
                if count < *min {
                    return None;
                }
                let last = rest.is_empty() && then.is_none();
                if last || *possessive {
                    return self.run(rest, text, end, then);
                }
                loop {
                    if let Some(end) = self.run(rest, text, end, then) {
                        return Some(end);
                    }
                    if count == *min {
                        return None;
                    }
                    count -= 1;
                    end -= 1;
                    while self.sets.bytes.is_none() && text[end] & 0xc0 == 0x80 {
                        end -= 1;
                    }
                }
            }
            Item::Group { branches, optional } => {
                let then = Then {
                    items: rest,
                    next: then,
                };
                let found = branches
                    .iter()
                    .find_map(|branch| self.run(branch, text, at, Some(&then)));
                match found {
                    None if *optional => self.run(then.items, text, at, then.next),
                    found => found,
                }
            }
            Item::Ahead { set, negative } => {
                let there = at < text.len() && self.sets.of(text, at).0 & set != 0;
                (there != *negative).then(|| self.run(rest, text, at, then))?
            }
            Item::End => (at == text.len()).then(|| self.run(rest, text, at, then))?,
        }
    }
}

/// The bytes of the character that begins with this one.
#[inline]
pub(super) fn width(first: u8) -> usize {
    match first {
        0..0x80 => 1,
        0x80..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    }
}

/// The character at `at` of UTF-8 text, and its bytes.
#[inline]
pub(super) fn character(text: &[u8], at: usize) -> (u32, usize) {
    let low = |i: usize| u32::from(text.get(at + i).copied().unwrap_or(0) & 0x3f);
    let first = u32::from(text[at]);
    match first {
        0..0x80 => (first, 1),
        0x80..0xe0 => ((first & 0x1f) << 6 | low(1), 2),
        0xe0..0xf0 => ((first & 0xf) << 12 | low(1) << 6 | low(2), 3),
        _ => ((first & 7) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
    }
}

/// The sets a first character may be of, and whether the items match no text at all.
fn first_of(items: &[Item]) -> (u32, bool) {
    let mut first = 0;
    for item in items {
        match item {
            Item::Run { set, min, .. } => {
                first |= set;
                if *min > 0 {
                    return (first, false);
                }
            }
            Item::Group { branches, optional } => {
                let mut empty = *optional;
                for branch in branches {
                    let (of_branch, may_be_empty) = first_of(branch);
                    first |= of_branch;
                    empty |= may_be_empty;
                }
                if !empty {
                    return (first, false);
                }
            }
            Item::Ahead { .. } | Item::End => {}
        }
    }
    (first, true)
}

/// Note which sets can follow which, behind a character of the sets `last`; returns those of the last character.
fn note_follow(items: &[Item], mut last: u32, follow: &mut [u32; MAX_SETS]) -> u32 {
    let note = |mut last: u32, next: u32, follow: &mut [u32; MAX_SETS]| {
        while last != 0 {
            follow[last.trailing_zeros() as usize] |= next;
            last &= last - 1;
        }
    };
    for item in items {
        match item {
            Item::Run { set, min, max, .. } => {
                note(last, *set, follow);
                if *max > 1 {
                    note(*set, *set, follow);
                }
                last = if *min == 0 { last | set } else { *set };
            }
            Item::Group { branches, optional } => {
                let before = last;
                last = if *optional { before } else { 0 };
                for branch in branches {
                    last |= note_follow(branch, before, follow);
                }
            }
            Item::Ahead { .. } | Item::End => {}
        }
    }
    last
}

/// The set of which one character is all that the items need, and those that something before takes for good.
fn alone(items: &[Item]) -> Option<(u32, u32)> {
    let (mut needed, mut taken) = (None, 0);
    for item in items {
        match item {
            Item::Run { set, min: 1, .. } if needed.is_none() => needed = Some(*set),
            Item::Run {
                set,
                min: 0,
                possessive,
                ..
            } => {
                if *possessive && needed.is_none() {
                    taken |= set;
                }
            }
            Item::Group { optional: true, .. } => {}
            _ => return None,
        }
    }
    needed.map(|set| (set, taken))
}

/// Whether trying the items costs no more than some passes over the text: at most two unbounded repeats can
/// be taken back, and nothing after the second can fail.
fn steady(items: &[Item]) -> bool {
    let mut unbounded = 0;
    for item in items {
        match item {
            Item::Run {
                min,
                max: u32::MAX,
                possessive: false,
                ..
            } => {
                unbounded += 1;
                if unbounded > 2 && *min > 0 {
                    return false;
                }
            }
            Item::Group { branches, optional } => {
                let endless = |item: &Item| !matches!(item, Item::Run { max, .. } if *max < 8);
                if branches.iter().flatten().any(endless) || (unbounded > 1 && !optional) {
                    return false;
                }
            }
            Item::Run { min, .. } if unbounded > 1 && *min > 0 => return false,
            Item::Ahead { .. } | Item::End if unbounded > 1 => return false,
            _ => {}
        }
    }
    unbounded < 4
}

/// Which of a pattern's sets a character is of.
#[derive(Debug)]
struct Sets {
    ascii: [u32; 128],
    /// Block of each 256 characters.
    index: Vec<u16>,
    blocks: Vec<[u32; 256]>,
    /// Where each byte is a character.
    bytes: Option<Box<[u32; 256]>>,
}

impl Sets {
    fn of_bytes(classes: &[ClassUnicode], char_of: fn(u8) -> char) -> Self {
        let mut bytes = Box::new([0; 256]);
        for (byte, sets) in (0..=255).zip(bytes.iter_mut()) {
            let c = char_of(byte);
            let holds = |class: &ClassUnicode| {
                let ranges = class.ranges();
                let at = ranges.partition_point(|range| range.end() < c);
                ranges.get(at).is_some_and(|range| range.start() <= c)
            };
            let of = classes.iter().enumerate().filter(|(_, class)| holds(class));
            *sets = of.fold(0, |sets, (bit, _)| sets | 1 << bit);
        }
        let mut ascii = [0; 128];
        ascii.copy_from_slice(&bytes[..128]);
        Self {
            ascii,
            index: Vec::new(),
            blocks: Vec::new(),
            bytes: Some(bytes),
        }
    }

    #[inline]
    fn width(&self, first: u8) -> usize {
        match self.bytes {
            Some(_) => 1,
            None => width(first),
        }
    }

    fn new(classes: &[ClassUnicode]) -> Self {
        let mut index = vec![0u16; 0x1100];
        let mut blocks = vec![[0u32; 256]];
        // Blocks that lie within the ranges they meet are many and alike.
        let mut whole = vec![(0u32, 0u16)];
        let mut cursors = vec![0usize; classes.len()];
        for (number, slot) in index.iter_mut().enumerate() {
            let (low, high) = (number as u32 * 256, number as u32 * 256 + 255);
            let mut everywhere = 0;
            let mut block: Option<[u32; 256]> = None;
            for (bit, (class, cursor)) in classes.iter().zip(&mut cursors).enumerate() {
                let ranges = class.ranges();
                while ranges.get(*cursor).is_some_and(|r| (r.end() as u32) < low) {
                    *cursor += 1;
                }
                for range in &ranges[*cursor..] {
                    let (start, end) = (range.start() as u32, range.end() as u32);
                    if start > high {
                        break;
                    }
                    if start <= low && end >= high {
                        everywhere |= 1 << bit;
                        break;
                    }
                    let block = block.get_or_insert([0; 256]);
                    let (from, to) = (start.max(low) - low, end.min(high) - low);
                    for sets in &mut block[from as usize..=to as usize] {
                        *sets |= 1 << bit;
                    }
                }
            }
            let mut add = |block| {
                blocks.push(block);
                (blocks.len() - 1) as u16
            };
            *slot = match block {
                Some(mut block) => {
                    block.iter_mut().for_each(|sets| *sets |= everywhere);
                    add(block)
                }
                None => match whole.iter().find(|(sets, _)| *sets == everywhere) {
                    Some(&(_, slot)) => slot,
                    None => {
                        let slot = add([everywhere; 256]);
                        whole.push((everywhere, slot));
                        slot
                    }
                },
            };
        }
        let first = blocks[index[0] as usize];
        let mut ascii = [0; 128];
        ascii.copy_from_slice(&first[..128]);
        Self {
            ascii,
            index,
            blocks,
            bytes: None,
        }
    }

    /// The sets of the character at `at`, and its bytes.
    #[inline]
    fn of(&self, text: &[u8], at: usize) -> (u32, usize) {
        if let Some(&sets) = self.ascii.get(text[at] as usize) {
            return (sets, 1);
        }
        if let Some(bytes) = &self.bytes {
            return (bytes[text[at] as usize], 1);
        }
        let (c, width) = character(text, at);
        let block = self.index.get((c >> 8) as usize).copied().unwrap_or(0);
        (self.blocks[block as usize][(c & 0xff) as usize], width)
    }

    /// The end of the run of at most `max` characters of `set`, and how many they are.
    #[inline]
    fn run(&self, text: &[u8], mut at: usize, set: u32, max: u32) -> (usize, u32) {
        let mut count = 0;
        while count < max
            && let Some(&byte) = text.get(at)
        {
            let (sets, width) = match self.ascii.get(byte as usize) {
                Some(&sets) => (sets, 1),
                None => self.of(text, at),
            };
            if sets & set == 0 {
                break;
            }
            at += width;
            count += 1;
        }
        (at.min(text.len()), count)
    }
}

struct Parser<'a> {
    rest: &'a str,
    sets: Vec<ClassUnicode>,
    /// The expression is the `tokenizers` crate's own, which is of the regex crate's dialect: `\w` is known.
    own: bool,
}

impl Parser<'_> {
    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn alternatives(&mut self, ignore_case: bool, depth: usize) -> Option<Vec<Vec<Item>>> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut branches = vec![Vec::new()];
        loop {
            if self.rest.is_empty() || self.rest.starts_with(')') {
                return Some(branches);
            }
            if self.take("|") {
                branches.push(Vec::new());
                continue;
            }
            let item = self.item(ignore_case, depth)?;
            branches.last_mut()?.push(item);
        }
    }

    fn item(&mut self, ignore_case: bool, depth: usize) -> Option<Item> {
        if self.take("$") {
            return Some(Item::End);
        }
        for (open, negative) in [("(?!", true), ("(?=", false)] {
            if self.take(open) {
                let set = self.set(ignore_case)?;
                return self.take(")").then_some(Item::Ahead { set, negative });
            }
        }
        if self.rest.starts_with('(') {
            let ignore_case = match () {
                () if self.take("(?i:") => true,
                () if self.take("(?:") => ignore_case,
                () if self.rest.starts_with("(?") => return None,
                () => self.take("(") && ignore_case,
            };
            let branches = self.alternatives(ignore_case, depth + 1)?;
            let closed = self.take(")");
            let optional = self.take("?");
            let plain = !self.rest.starts_with(['*', '+', '?', '{']);
            return (closed && plain).then_some(Item::Group { branches, optional });
        }
        let set = self.set(ignore_case)?;
        let (min, max) = self.repeats()?;
        let possessive = (min, max) != (1, 1) && self.take("+");
        let plain = !self.rest.starts_with(['*', '+', '?', '{']);
        plain.then_some(Item::Run {
            set,
            min,
            max,
            possessive,
        })
    }

    fn repeats(&mut self) -> Option<(u32, u32)> {
        if self.take("*") {
            return Some((0, u32::MAX));
        }
        if self.take("+") {
            return Some((1, u32::MAX));
        }
        if self.take("?") {
            return Some((0, 1));
        }
        if !self.take("{") {
            return Some((1, 1));
        }
        let (inside, rest) = self.rest.split_once('}')?;
        self.rest = rest;
        let (min, max) = inside.split_once(',').unwrap_or((inside, inside));
        let min: u32 = min.parse().ok()?;
        let max = match max {
            "" => u32::MAX,
            max => max.parse().ok()?,
        };
        (min <= max && max > 0 && min < 1000).then_some((min, max))
    }

    /// One character's set: its bit.
    fn set(&mut self, ignore_case: bool) -> Option<u32> {
        let length = self.set_length()?;
        let (text, rest) = self.rest.split_at_checked(length)?;
        let class = class(text, ignore_case)?;
        self.rest = rest;
        let bit = match self.sets.iter().position(|set| *set == class) {
            Some(bit) => bit,
            None => {
                self.sets.push(class);
                self.sets.len() - 1
            }
        };
        (bit < MAX_SETS).then(|| 1 << bit)
    }

    fn set_length(&self) -> Option<usize> {
        let mut chars = self.rest.char_indices();
        match chars.next()?.1 {
            '\\' => match chars.next()?.1 {
                'p' | 'P' if self.rest[2..].starts_with('{') => {
                    self.rest.find('}').map(|end| end + 1)
                }
                's' | 'S' | 'r' | 'n' | 't' => Some(2),
                'w' if self.own => Some(2),
                c if c.is_ascii_punctuation() => Some(2),
                _ => None,
            },
            '[' => self.bracket_length(),
            '.' | '^' | '*' | '+' | '?' | '{' | '}' | ')' | ']' => None,
            c => Some(c.len_utf8()),
        }
    }

    fn bracket_length(&self) -> Option<usize> {
        let mut escaped = false;
        for (at, c) in self.rest.char_indices().skip(1) {
            match c {
                _ if escaped => {
                    escaped = false;
                    let own = self.own && c == 'w';
                    if !(own || "pPsSrnt".contains(c) || c.is_ascii_punctuation()) {
                        return None;
                    }
                }
                '\\' => escaped = true,
                '[' => return None,
                // `[]...]` and `[^]...]` hold the bracket itself in some dialects.
                ']' if at == 1 || &self.rest[..at] == "[^" => return None,
                ']' => return Some(at + 1),
                _ => {}
            }
        }
        None
    }
}

/// The characters that an expression for one character matches.
pub(super) fn class(regex: &str, ignore_case: bool) -> Option<ClassUnicode> {
    let doubled = ["&&", "--", "~~"].iter().any(|op| regex.contains(op));
    if doubled {
        return None;
    }
    let parsed = regex_syntax::ParserBuilder::new()
        .case_insensitive(ignore_case)
        .build()
        .parse(regex)
        .ok()?;
    match parsed.into_kind() {
        HirKind::Class(Class::Unicode(class)) => Some(class),
        HirKind::Class(Class::Bytes(class)) => class.to_unicode_class(),
        HirKind::Literal(literal) => {
            let text = std::str::from_utf8(&literal.0).ok()?;
            let mut chars = text.chars();
            let c = chars.next().filter(|_| chars.next().is_none())?;
            let range = regex_syntax::hir::ClassUnicodeRange::new(c, c);
            Some(ClassUnicode::new([range]))
        }
        _ => None,
    }
}
