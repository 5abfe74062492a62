//! The shortest way from a place within a grammar's text to its end. Follows the text byte by byte as llguidance's lexer
//! and Earley parser do (Earley, 1970), over the same compiled grammar, and keeps what each open rule still needs.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::ParserLimits;
use llguidance::derivre::NextByte;
use llguidance::earley::lexerspec::{LexemeClass, LexemeIdx};
use llguidance::earley::regexvec::{LexemeSet, RegexVec};
use llguidance::earley::{CGrammar, CSymIdx};
use llguidance::toktrie::TokTrie;

/// A place in the right-hand side of a rule; llguidance does not name its type.
type Dot = usize;
/// A state of the lexer; llguidance does not name its type either.
type State = llguidance::derivre::StateID;
type Cost = u64;

/// No way to the end is known.
const NONE: Cost = Cost::MAX;
/// Items of a row, and states looked at for one lexeme's end: beyond, the way is lost rather than the time.
const MAX_ITEMS: usize = 4000;
const MAX_STATES: usize = 20_000;

/// What stands at a dot.
#[derive(Clone, Copy)]
enum At {
    End,
    Symbol(usize),
}

/// A symbol of the grammar, and its cheapest text.
struct Symbol {
    rules: Vec<Dot>,
    nullable: bool,
    terminal: Option<LexemeIdx>,
    /// A terminal that is a token of the vocabulary's own, not text.
    token: Option<u32>,
    /// Bytes of the shortest text, a special token counting as one.
    cost: Cost,
    /// The rule that has it; none: the empty text.
    best: Option<Dot>,
}

/// A compiled grammar, ready to be followed. Shared by all requests that use it.
pub struct Analysis {
    symbols: Vec<Symbol>,
    /// By dot: what stands there, the rule's left side, the cost of all that follows.
    at: Vec<At>,
    lhs: Vec<usize>,
    rest: Vec<Cost>,
    start: usize,
    skip: Option<LexemeIdx>,
    skips_first: bool,
    lexer: Mutex<Lexer>,
}

/// The lexer's automaton, grown as it is used.
struct Lexer {
    dfa: RegexVec,
    empty: LexemeSet,
    /// One byte per class of bytes that the automaton tells apart, pleasant ones first.
    bytes: Vec<u8>,
    /// From a state of one lexeme: bytes to its end, and the next of them.
    ways: HashMap<State, Option<(u32, u8, State)>>,
}

/// A piece of the way to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Bytes(Vec<u8>),
    Token(u32),
}

impl Analysis {
    /// None: a grammar whose rules have conditions; it can be obeyed, and its end not be foreseen.
    pub fn new(grammar: &CGrammar, trie: &TokTrie) -> Option<Self> {
        if grammar.parametric() {
            return None;
        }
        let spec = grammar.lexer_spec();
        let dfa = spec.to_regex_vec(&mut ParserLimits::default()).ok()?;
        let mut lexer = Lexer::new(dfa, spec.alloc_lexeme_set());
        let mut built = Builder::new(grammar, trie).symbols(&mut lexer);
        built.cheapest();
        let skip = spec.skip_id(LexemeClass::ROOT);
        let start_of_skip = lexer.initial([skip]);
        Some(Self {
            start: grammar.start().as_index(),
            skip: (!start_of_skip.is_dead()).then_some(skip),
            skips_first: spec.allow_initial_skip,
            symbols: built.symbols,
            at: built.at,
            lhs: built.lhs,
            rest: built.rest,
            lexer: Mutex::new(lexer),
        })
    }

    /// Append a symbol's cheapest text.
    fn write(&self, symbol: usize, lexer: &mut Lexer, out: &mut Vec<Piece>) {
        let mut open = vec![symbol];
        while let Some(symbol) = open.pop() {
            let this = &self.symbols[symbol];
            match (this.token, this.terminal, this.best) {
                (Some(id), ..) => out.push(Piece::Token(id)),
                (None, Some(lexeme), _) => {
                    let state = lexer.initial([lexeme]);
                    lexer.write(state, lexeme, out);
                }
                (None, None, Some(rule)) => open.extend(self.symbols_from(rule).rev()),
                (None, None, None) => {}
            }
        }
    }

    fn symbols_from(&self, dot: Dot) -> impl DoubleEndedIterator<Item = usize> + '_ {
        let count = self.at[dot..]
            .iter()
            .take_while(|at| matches!(at, At::Symbol(_)))
            .count();
        self.at[dot..dot + count].iter().filter_map(|at| match at {
            At::Symbol(symbol) => Some(*symbol),
            At::End => None,
        })
    }
}

/// The grammar's tables as plain vectors.
struct Builder<'a> {
    grammar: &'a CGrammar,
    trie: &'a TokTrie,
    symbols: Vec<Symbol>,
    at: Vec<At>,
    lhs: Vec<usize>,
    rest: Vec<Cost>,
}

impl<'a> Builder<'a> {
    fn new(grammar: &'a CGrammar, trie: &'a TokTrie) -> Self {
        Self {
            grammar,
            trie,
            symbols: Vec::new(),
            at: Vec::new(),
            lhs: Vec::new(),
            rest: Vec::new(),
        }
    }

    fn symbols(mut self, lexer: &mut Lexer) -> Self {
        // Symbols are reached from the start; those that are not stay empty.
        let mut open = vec![self.grammar.start()];
        let mut seen: HashSet<CSymIdx> = open.iter().copied().collect();
        while let Some(index) = open.pop() {
            let data = self.grammar.sym_data(index);
            let mut rules = Vec::new();
            for rule in &data.rules {
                let (symbols, _, _) = self.grammar.rule_rhs(*rule);
                rules.push(self.at.len());
                for symbol in symbols {
                    self.at.push(At::Symbol(symbol.as_index()));
                    self.lhs.push(index.as_index());
                    if seen.insert(*symbol) {
                        open.push(*symbol);
                    }
                }
                self.at.push(At::End);
                self.lhs.push(index.as_index());
            }
            let token = data.lexeme.and_then(|lexeme| self.special_token(lexeme));
            let cost = match (data.lexeme, token) {
                (_, Some(_)) => 1,
                (Some(lexeme), None) => {
                    let state = lexer.initial([lexeme]);
                    lexer
                        .way(state, lexeme)
                        .map_or(NONE, |(n, ..)| Cost::from(n))
                }
                (None, None) => NONE,
            };
            self.put(
                index.as_index(),
                Symbol {
                    rules,
                    nullable: data.is_nullable,
                    terminal: data.lexeme,
                    token,
                    cost: if data.is_nullable { 0 } else { cost },
                    best: None,
                },
            );
        }
        self.rest = vec![NONE; self.at.len()];
        self
    }

    fn put(&mut self, index: usize, symbol: Symbol) {
        while self.symbols.len() <= index {
            self.symbols.push(Symbol {
                rules: Vec::new(),
                nullable: false,
                terminal: None,
                token: None,
                cost: NONE,
                best: None,
            });
        }
        self.symbols[index] = symbol;
    }

    fn special_token(&self, lexeme: LexemeIdx) -> Option<u32> {
        let mut one = self.grammar.lexer_spec().alloc_lexeme_set();
        one.add(lexeme);
        let spec = *self
            .grammar
            .lexer_spec()
            .token_range_lexemes(&one)
            .first()?;
        (0..self.trie.vocab_size() as u32).find(|id| spec.contains_token(*id))
    }

    /// Each symbol's cheapest text: costs fall until none does.
    fn cheapest(&mut self) {
        let mut falling = true;
        while falling {
            falling = false;
            for symbol in 0..self.symbols.len() {
                for rule in self.symbols[symbol].rules.clone() {
                    let cost = self.sum(rule);
                    if cost < self.symbols[symbol].cost {
                        self.symbols[symbol].cost = cost;
                        self.symbols[symbol].best = Some(rule);
                        falling = true;
                    }
                }
            }
        }
        for dot in (0..self.at.len()).rev() {
            self.rest[dot] = match self.at[dot] {
                At::End => 0,
                At::Symbol(symbol) => self.symbols[symbol].cost.saturating_add(self.rest[dot + 1]),
            };
        }
    }

    fn sum(&self, rule: Dot) -> Cost {
        let mut cost: Cost = 0;
        for at in &self.at[rule..] {
            match at {
                At::End => break,
                At::Symbol(symbol) => cost = cost.saturating_add(self.symbols[*symbol].cost),
            }
        }
        cost
    }
}

impl Lexer {
    fn new(mut dfa: RegexVec, empty: LexemeSet) -> Self {
        dfa.set_fuel(u64::MAX);
        // Letters first, so that what has to be filled up reads as such; then what ends things.
        let liked = (b'a'..=b'z')
            .chain(b'0'..=b'9')
            .chain(*b" \"'.,:;-_/[]{}()")
            .chain(0..=255);
        let mut seen = HashSet::new();
        let bytes = liked.filter(|b| seen.insert(dfa.alpha().map(*b))).collect();
        Self {
            dfa,
            empty,
            bytes,
            ways: HashMap::new(),
        }
    }

    fn initial(&mut self, lexemes: impl IntoIterator<Item = LexemeIdx>) -> State {
        let mut set = self.empty.clone();
        for lexeme in lexemes {
            set.add(lexeme);
        }
        self.dfa.initial_state(&set)
    }

    fn ends(&self, state: State, lexeme: LexemeIdx) -> bool {
        let info = self.dfa.state_desc(state);
        info.greedy_accepting.contains(lexeme) || info.lazy_accepting.contains(lexeme)
    }

    /// Bytes from a state to the end of a lexeme, the first of them, and the state after it.
    fn way(&mut self, state: State, lexeme: LexemeIdx) -> Option<(u32, u8, State)> {
        let mut one = self.empty.clone();
        one.add(lexeme);
        let state = self.dfa.limit_state_to(state, &one);
        if let Some(known) = self.ways.get(&state) {
            return *known;
        }
        if self.ends(state, lexeme) {
            self.ways.insert(state, Some((0, 0, state)));
            return Some((0, 0, state));
        }
        let way = self.search(state, lexeme);
        if way.is_none() {
            self.ways.insert(state, None);
        }
        way
    }

    /// Breadth first. All states on the way found are noted.
    fn search(&mut self, from: State, lexeme: LexemeIdx) -> Option<(u32, u8, State)> {
        let mut came: HashMap<State, (State, u8)> = HashMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(state) = queue.pop_front() {
            if came.len() > MAX_STATES || self.dfa.has_error() {
                return None;
            }
            for i in 0..self.bytes.len() {
                let byte = self.bytes[i];
                let next = self.dfa.transition(state, byte);
                if next.is_dead() || next == from || came.contains_key(&next) {
                    continue;
                }
                came.insert(next, (state, byte));
                if self.ends(next, lexeme) {
                    return self.note(next, from, &came);
                }
                queue.push_back(next);
            }
        }
        None
    }

    fn note(
        &mut self,
        end: State,
        from: State,
        came: &HashMap<State, (State, u8)>,
    ) -> Option<(u32, u8, State)> {
        self.ways.insert(end, Some((0, 0, end)));
        let (mut next, mut length) = (end, 0);
        while next != from {
            let (state, byte) = *came.get(&next)?;
            length += 1;
            self.ways.insert(state, Some((length, byte, next)));
            next = state;
        }
        self.ways.get(&from).copied().flatten()
    }

    fn write(&mut self, state: State, lexeme: LexemeIdx, out: &mut Vec<Piece>) {
        let mut way = self.way(state, lexeme);
        while let Some((length, byte, next)) = way {
            if length == 0 {
                return;
            }
            match out.last_mut() {
                Some(Piece::Bytes(bytes)) => bytes.push(byte),
                _ => out.push(Piece::Bytes(vec![byte])),
            }
            way = self.way(next, lexeme);
        }
    }
}

/// A rule under way: where its dot is, and the row it began in.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Item {
    dot: Dot,
    origin: usize,
}

/// All rules under way at the edge of two lexemes.
struct Row {
    items: Vec<Item>,
    /// For a symbol that items here wait for: what remains after it to the end of the text, and the item to go on with.
    after: HashMap<usize, (Cost, usize)>,
    start: State,
    complete: bool,
}

/// Where a text stands in its grammar.
pub struct Tracker {
    analysis: Arc<Analysis>,
    rows: Vec<Row>,
    state: State,
    /// The lexeme under way.
    lexeme: Vec<u8>,
    /// The longest numeral that the last push went through.
    numeral: usize,
}

/// To go back to.
pub struct Mark {
    rows: usize,
    state: State,
    lexeme: Vec<u8>,
}

impl Tracker {
    /// At the start of a text; none when no text ends.
    pub fn new(analysis: &Arc<Analysis>) -> Option<Self> {
        let mut lexer = lock(&analysis.lexer);
        let first = analysis.symbols[analysis.start].rules.iter();
        let items = first
            .map(|rule| Item {
                dot: *rule,
                origin: 0,
            })
            .collect();
        let row = analysis.row(items, &[], &mut lexer)?;
        let state = row.start;
        drop(lexer);
        Some(Self {
            analysis: analysis.clone(),
            rows: vec![row],
            state,
            lexeme: Vec::new(),
            numeral: 0,
        })
    }

    pub fn mark(&self) -> Mark {
        Mark {
            rows: self.rows.len(),
            state: self.state,
            lexeme: self.lexeme.clone(),
        }
    }

    pub fn back(&mut self, mark: Mark) {
        self.rows.truncate(mark.rows);
        self.state = mark.state;
        self.lexeme = mark.lexeme;
    }

    /// The longest run of a number's characters that the last `push` was in.
    pub fn numeral(&self) -> usize {
        self.numeral
    }

    /// The lexeme under way, as far as it is there.
    pub fn lexeme(&self) -> &[u8] {
        &self.lexeme
    }

    /// Follow a token of text, or a special one; false: the way is lost, and the tracker of no more use.
    pub fn push(&mut self, trie: &TokTrie, id: u32) -> bool {
        self.numeral = 0;
        let analysis = self.analysis.clone();
        let mut lexer = lock(&analysis.lexer);
        if trie.is_special_token(id) {
            return self.push_special(id, &mut lexer);
        }
        trie.token(id)
            .iter()
            .all(|byte| self.push_byte(*byte, &mut lexer))
    }

    fn push_special(&mut self, id: u32, lexer: &mut Lexer) -> bool {
        if !self.lexeme.is_empty() && !self.end_lexeme(lexer) {
            return false;
        }
        let analysis = self.analysis.clone();
        self.scan(lexer, |symbol| analysis.symbols[symbol].token == Some(id))
    }

    fn push_byte(&mut self, byte: u8, lexer: &mut Lexer) -> bool {
        let next = lexer.dfa.transition(self.state, byte);
        if next.is_dead() {
            // The byte begins another lexeme.
            if self.lexeme.is_empty() || !self.end_lexeme(lexer) {
                return false;
            }
            let next = lexer.dfa.transition(self.state, byte);
            return !next.is_dead() && self.enter(next, byte, lexer);
        }
        self.enter(next, byte, lexer)
    }

    fn enter(&mut self, state: State, byte: u8, lexer: &mut Lexer) -> bool {
        self.state = state;
        self.lexeme.push(byte);
        if matches!(self.lexeme[0], b'-' | b'0'..=b'9') {
            self.numeral = self.numeral.max(self.lexeme.len());
        }
        if state.has_lowest_match() {
            let ends = lexer.dfa.state_desc(state);
            if ends.lazy_hidden_len > 0 {
                return false;
            }
            let ends = ends.lazy_accepting.clone();
            return self.scan_lexeme(lexer, &ends);
        }
        if lexer.dfa.next_byte(state) == NextByte::ForcedEOI {
            return self.end_lexeme(lexer);
        }
        true
    }

    fn end_lexeme(&mut self, lexer: &mut Lexer) -> bool {
        let ends = lexer.dfa.state_desc(self.state).greedy_accepting.clone();
        self.scan_lexeme(lexer, &ends)
    }

    fn scan_lexeme(
        &mut self,
        lexer: &mut Lexer,
        ends: &llguidance::earley::regexvec::MatchingLexemes,
    ) -> bool {
        let analysis = self.analysis.clone();
        if analysis.skip.is_some_and(|skip| ends.contains(skip)) {
            // What is skipped changes nothing.
            self.state = self.rows.last().map_or(self.state, |row| row.start);
            self.lexeme.clear();
            return true;
        }
        self.scan(lexer, |symbol| {
            analysis.symbols[symbol]
                .terminal
                .is_some_and(|lexeme| ends.contains(lexeme))
        })
    }

    fn scan(&mut self, lexer: &mut Lexer, scanned: impl Fn(usize) -> bool) -> bool {
        let Some(last) = self.rows.last() else {
            return false;
        };
        let analysis = self.analysis.clone();
        let items: Vec<Item> = last
            .items
            .iter()
            .filter(|item| matches!(analysis.at[item.dot], At::Symbol(symbol) if scanned(symbol)))
            .map(|item| Item {
                dot: item.dot + 1,
                ..*item
            })
            .collect();
        if items.is_empty() {
            return false;
        }
        let Some(row) = analysis.row(items, &self.rows, lexer) else {
            return false;
        };
        self.state = row.start;
        self.lexeme.clear();
        self.rows.push(row);
        true
    }

    /// The shortest text that ends it from here; none when no way is known.
    pub fn way(&self) -> Option<Vec<Piece>> {
        let analysis = &self.analysis;
        let row = self.rows.last()?;
        if row.complete && self.lexeme.is_empty() {
            return Some(Vec::new());
        }
        let mut lexer = lock(&analysis.lexer);
        let possible = lexer.dfa.state_desc(self.state).possible.clone();
        let mut best: Option<(Cost, Item, usize)> = None;
        for item in &row.items {
            let At::Symbol(symbol) = analysis.at[item.dot] else {
                continue;
            };
            let this = &analysis.symbols[symbol];
            let here = match (this.token, this.terminal) {
                (Some(_), _) if self.lexeme.is_empty() => 1,
                (None, Some(lexeme)) if possible.contains(lexeme) => {
                    match lexer.way(self.state, lexeme) {
                        Some((length, ..)) => Cost::from(length),
                        None => continue,
                    }
                }
                _ => continue,
            };
            let cost = here
                .saturating_add(analysis.rest[item.dot + 1])
                .saturating_add(self.beyond(*item));
            if cost < best.map_or(NONE, |(cost, ..)| cost) {
                best = Some((cost, *item, symbol));
            }
        }
        let (_, item, symbol) = best?;
        let mut out = Vec::new();
        match (
            analysis.symbols[symbol].token,
            analysis.symbols[symbol].terminal,
        ) {
            (Some(id), _) => out.push(Piece::Token(id)),
            (None, Some(lexeme)) => lexer.write(self.state, lexeme, &mut out),
            (None, None) => return None,
        }
        self.write_rest(
            Item {
                dot: item.dot + 1,
                ..item
            },
            &mut lexer,
            &mut out,
        )?;
        Some(out)
    }

    /// What remains once the item's rule is done.
    fn beyond(&self, item: Item) -> Cost {
        let row = &self.rows[item.origin];
        row.after
            .get(&self.analysis.lhs[item.dot])
            .map_or(NONE, |(cost, _)| *cost)
    }

    /// Append the rest of an item, and of all that waits for it.
    fn write_rest(&self, mut item: Item, lexer: &mut Lexer, out: &mut Vec<Piece>) -> Option<()> {
        const DEEPEST: usize = 100_000;
        for _ in 0..DEEPEST {
            for symbol in self.analysis.symbols_from(item.dot) {
                self.analysis.write(symbol, lexer, out);
            }
            let lhs = self.analysis.lhs[item.dot];
            let row = &self.rows[item.origin];
            let (_, next) = row.after.get(&lhs)?;
            if *next == usize::MAX {
                return Some(());
            }
            let waiting = row.items.get(*next)?;
            item = Item {
                dot: waiting.dot + 1,
                ..*waiting
            };
        }
        None
    }
}

impl Analysis {
    /// A row with all that its first items imply; none when it grows too large.
    fn row(&self, items: Vec<Item>, rows: &[Row], lexer: &mut Lexer) -> Option<Row> {
        let here = rows.len();
        let mut items = items;
        let mut known: HashSet<Item> = items.iter().copied().collect();
        let mut complete = false;
        let mut terminals = Vec::new();
        let mut i = 0;
        while i < items.len() {
            if items.len() > MAX_ITEMS {
                return None;
            }
            let item = items[i];
            i += 1;
            let mut add = |item: Item, items: &mut Vec<Item>| {
                if known.insert(item) {
                    items.push(item);
                }
            };
            match self.at[item.dot] {
                At::End => {
                    let lhs = self.lhs[item.dot];
                    complete |= lhs == self.start && item.origin == 0;
                    if item.origin == here {
                        continue; // an empty symbol: those that wait for it have passed over it
                    }
                    for waiting in &rows[item.origin].items {
                        if matches!(self.at[waiting.dot], At::Symbol(symbol) if symbol == lhs) {
                            add(
                                Item {
                                    dot: waiting.dot + 1,
                                    ..*waiting
                                },
                                &mut items,
                            );
                        }
                    }
                }
                At::Symbol(symbol) => {
                    let this = &self.symbols[symbol];
                    if let (Some(lexeme), None) = (this.terminal, this.token) {
                        terminals.push(lexeme);
                    }
                    for rule in &this.rules {
                        add(
                            Item {
                                dot: *rule,
                                origin: here,
                            },
                            &mut items,
                        );
                    }
                    if this.nullable {
                        add(
                            Item {
                                dot: item.dot + 1,
                                ..item
                            },
                            &mut items,
                        );
                    }
                }
            }
        }
        terminals.extend(self.skip.filter(|_| here > 0 || self.skips_first));
        let start = lexer.initial(terminals);
        let after = self.after(&items, rows);
        Some(Row {
            items,
            after,
            start,
            complete: complete || (here == 0 && self.symbols[self.start].nullable),
        })
    }

    /// For each symbol that items wait for, the least that remains after it.
    fn after(&self, items: &[Item], rows: &[Row]) -> HashMap<usize, (Cost, usize)> {
        let mut after: HashMap<usize, (Cost, usize)> = HashMap::new();
        if rows.is_empty() {
            after.insert(self.start, (0, usize::MAX));
        }
        let mut falling = true;
        while falling {
            falling = false;
            for (i, item) in items.iter().enumerate() {
                let At::Symbol(symbol) = self.at[item.dot] else {
                    continue;
                };
                let lhs = self.lhs[item.dot];
                let outer = if item.origin == rows.len() {
                    &after
                } else {
                    &rows[item.origin].after
                };
                let Some((beyond, _)) = outer.get(&lhs) else {
                    continue;
                };
                let cost = self.rest[item.dot + 1].saturating_add(*beyond);
                if cost < after.get(&symbol).map_or(NONE, |(cost, _)| *cost) {
                    after.insert(symbol, (cost, i));
                    falling = true;
                }
            }
        }
        after
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The least number of tokens that spell these pieces, as the tokens themselves; none where a byte has no token.
pub fn fewest_tokens(trie: &TokTrie, pieces: &[Piece]) -> Option<Vec<u32>> {
    let mut tokens = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Token(id) => tokens.push(*id),
            Piece::Bytes(bytes) => tokens.extend(fewest(trie, bytes)?),
        }
    }
    Some(tokens)
}

/// Shortest path over the bytes, from the end.
fn fewest(trie: &TokTrie, bytes: &[u8]) -> Option<Vec<u32>> {
    let mut best: Vec<Option<(u32, u32, usize)>> = vec![None; bytes.len() + 1];
    best[bytes.len()] = Some((0, 0, 0));
    for at in (0..bytes.len()).rev() {
        let mut node = trie.root();
        for (n, byte) in bytes[at..].iter().enumerate() {
            let Some(child) = trie.child_at_byte(node, *byte) else {
                break;
            };
            node = child;
            let (Some(id), Some((count, ..))) = (node.token_id(), best[at + n + 1]) else {
                continue;
            };
            if best[at].is_none_or(|(least, ..)| count + 1 < least) {
                best[at] = Some((count + 1, id, at + n + 1));
            }
        }
    }
    let (mut tokens, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let (_, id, next) = best[at]?;
        tokens.push(id);
        at = next;
    }
    Some(tokens)
}
