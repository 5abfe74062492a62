//! `pprint`: values as Python's pprint.pformat lays them out, 80 characters wide with sorted keys.

use super::super::run::{CallArgs, Run};
use super::super::text;
use super::super::value::{Budget, Res, Value, str_repr};
use super::sort_by;

const WIDTH: isize = 80;

pub(super) fn pprint(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [] = args.bind("do_pprint", [])?;
    let mut printer = Printer {
        out: String::new(),
        budget: &mut run.budget,
    };
    printer.value(&value, 0, 0, 0)?;
    let out = printer.out;
    Ok(Value::made(out, &run.budget))
}

struct Printer<'b> {
    out: String,
    budget: &'b mut Budget,
}

impl Printer<'_> {
    /// A value that begins at column `indent`, with `allowance` characters to come behind it on its line.
    fn value(&mut self, value: &Value, indent: isize, allowance: isize, level: usize) -> Res<()> {
        let repr = self.repr(value)?;
        if width(&repr) <= WIDTH - indent - allowance {
            self.out.push_str(&repr);
            return Ok(());
        }
        match value {
            Value::Dict(dict) => {
                self.out.push('{');
                let items = self.sorted(&dict.entries)?;
                let (last, indent) = (items.len().saturating_sub(1), indent + 1);
                for (i, (key, item)) in items.into_iter().enumerate() {
                    let key = self.repr(key)?;
                    self.out.push_str(&key);
                    self.out.push_str(": ");
                    let behind = if i == last { allowance + 1 } else { 1 };
                    self.value(item, indent + width(&key) + 2, behind, level + 1)?;
                    if i != last {
                        self.next_line(indent)?;
                    }
                }
                self.out.push('}');
                Ok(())
            }
            Value::List(seq) => self.items(("[", "]"), &seq.items, indent, allowance, level),
            Value::Tuple(seq) => {
                let close = if seq.items.len() == 1 { ",)" } else { ")" };
                self.items(("(", close), &seq.items, indent, allowance, level)
            }
            Value::Str(s) if !s.markup => self.text(&s.text, &repr, indent, allowance, level),
            _ => {
                self.out.push_str(&repr);
                Ok(())
            }
        }
    }

    fn items(
        &mut self,
        (open, close): (&str, &str),
        items: &[Value],
        indent: isize,
        allowance: isize,
        level: usize,
    ) -> Res<()> {
        self.out.push_str(open);
        let (last, indent) = (items.len().saturating_sub(1), indent + 1);
        for (i, item) in items.iter().enumerate() {
            let behind = if i == last {
                allowance + close.len() as isize
            } else {
                1
            };
            self.value(item, indent, behind, level + 1)?;
            if i != last {
                self.next_line(indent)?;
            }
        }
        self.out.push_str(close);
        Ok(())
    }

    /// A text over several lines, cut at its own and behind white space; in brackets where it is all there is.
    fn text(
        &mut self,
        text: &str,
        whole: &str,
        mut indent: isize,
        mut allowance: isize,
        level: usize,
    ) -> Res<()> {
        if level == 0 {
            indent += 1;
            allowance += 1;
        }
        let mut chunks: Vec<String> = Vec::new();
        let lines = text::lines(text, true);
        let mut last_repr = whole.to_owned();
        for (i, line) in lines.iter().enumerate() {
            let end = i + 1 == lines.len();
            let room = |at_end: bool| WIDTH - indent - if at_end { allowance } else { 0 };
            last_repr = self.text_repr(line)?;
            if width(&last_repr) <= room(end) {
                chunks.push(last_repr.clone());
                continue;
            }
            let parts = parts(line);
            let mut current = String::new();
            for (j, part) in parts.iter().enumerate() {
                let candidate = format!("{current}{part}");
                let at_end = end && j + 1 == parts.len();
                if width(&self.text_repr(&candidate)?) > room(at_end) {
                    if !current.is_empty() {
                        chunks.push(self.text_repr(&current)?);
                    }
                    current = (*part).to_owned();
                } else {
                    current = candidate;
                }
            }
            if !current.is_empty() {
                chunks.push(self.text_repr(&current)?);
            }
        }
        if chunks.len() == 1 {
            self.out.push_str(&last_repr);
            return Ok(());
        }
        if level == 0 {
            self.out.push('(');
        }
        for (i, chunk) in chunks.iter().enumerate() {
            if i > 0 {
                self.new_line(indent)?;
            }
            self.out.push_str(chunk);
        }
        if level == 0 {
            self.out.push(')');
        }
        Ok(())
    }

    fn next_line(&mut self, indent: isize) -> Res<()> {
        self.out.push(',');
        self.new_line(indent)
    }

    fn new_line(&mut self, indent: isize) -> Res<()> {
        let spaces = usize::try_from(indent).unwrap_or(0);
        self.budget.bytes(spaces + 1)?;
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(' ', spaces));
        Ok(())
    }

    fn text_repr(&mut self, text: &str) -> Res<String> {
        self.budget.bytes(text.len() + 2)?;
        let mut out = String::with_capacity(text.len() + 2);
        str_repr(text, &mut out);
        Ok(out)
    }

    /// On one line, with the keys of dicts sorted.
    fn repr(&mut self, value: &Value) -> Res<String> {
        let mut out = String::new();
        self.write_repr(value, &mut out)?;
        Ok(out)
    }

    fn write_repr(&mut self, value: &Value, out: &mut String) -> Res<()> {
        let (open, items, close) = match value {
            Value::Dict(dict) => {
                out.push('{');
                for (i, (key, item)) in self.sorted(&dict.entries)?.into_iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    self.write_repr(key, out)?;
                    out.push_str(": ");
                    self.write_repr(item, out)?;
                }
                out.push('}');
                return Ok(());
            }
            Value::List(seq) => ("[", &seq.items, "]"),
            Value::Tuple(seq) if seq.items.len() == 1 => ("(", &seq.items, ",)"),
            Value::Tuple(seq) => ("(", &seq.items, ")"),
            other => return other.write_repr(out, self.budget),
        };
        out.push_str(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            self.write_repr(item, out)?;
        }
        out.push_str(close);
        Ok(())
    }

    /// By key; of keys that Python cannot compare, by the names of their types.
    fn sorted<'v>(&mut self, entries: &'v [(Value, Value)]) -> Res<Vec<(&'v Value, &'v Value)>> {
        let mut sorted: Vec<_> = entries.iter().map(|(key, value)| (key, value)).collect();
        self.budget
            .bytes(sorted.len() * size_of::<(&Value, &Value)>())?;
        let budget = &mut *self.budget;
        sort_by(&mut sorted, |a, b| {
            let by_type = || Some(a.0.type_name().cmp(b.0.type_name()));
            Ok(a.0.compare(b.0, "<", budget).unwrap_or_else(|_| by_type()))
        })?;
        Ok(sorted)
    }
}

fn width(text: &str) -> isize {
    isize::try_from(text.chars().count()).unwrap_or(isize::MAX)
}

/// Words, each with the white space behind it; white space at the start is a part of its own.
fn parts(line: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let word = rest.find(text::is_space).unwrap_or(rest.len());
        let space = rest[word..].find(|c| !text::is_space(c));
        let (part, after) = rest.split_at(space.map_or(rest.len(), |space| word + space));
        parts.push(part);
        rest = after;
    }
    parts
}
