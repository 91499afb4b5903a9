// SPDX-License-Identifier: GPL-2.0-only

//! How costs grow, as `dirtyscope bench` has measured it.

use crate::page::document;
use maud::{Markup, PreEscaped, html};
use serde::Deserialize;
use svg::node::element::{Circle, Line, SVG, Text, Title};

/// What is drawn of a bench's results.
#[derive(Deserialize)]
pub struct Bench {
    kernel: String,
    /// What a time is: `wall` or `instructions`.
    clock: String,
    growth: Vec<Growth>,
}

#[derive(Deserialize)]
struct Growth {
    operation: String,
    /// The unit of what it costs.
    cost: String,
    /// What grows.
    axis: String,
    points: Vec<(f64, f64)>,
    exponent: f64,
    /// That of the last two points, and whether it is where it should be.
    last: f64,
    expected: Expected,
    verdict: String,
}

#[derive(Deserialize)]
struct Expected {
    range: (f64, f64),
}

impl Bench {
    /// The unit of what something costs.
    fn unit<'a>(&self, growth: &'a Growth) -> &'a str {
        match &*growth.cost {
            "ns" if self.clock == "instructions" => "instr",
            unit => unit,
        }
    }
}

/// Pixels of a drawing's height, and of its edge below.
const HEIGHT: f64 = 190.0;
const EDGE: f64 = 22.0;

/// Percent of its width that the edge on its left has, and what is left for points.
const LEFT: f64 = 16.0;
const WIDTH: f64 = 80.0;

/// What the columns are.
const TABLE: &str = "The exponent of all points is what fits best; that at the end, of the last two, has to be where it \
    is expected.";

/// A page with the curves.
pub fn page(bench: &Bench, name: Option<&str>) -> String {
    let title = format!("dirtyscope {}", name.unwrap_or("bench"));
    let content = html! {
        h1 { (title) }
        p.run { "Linux " (bench.kernel) }
        p.note { "Both axes are logarithmic: a straight line is a power, and its exponent says which. " (TABLE) }
        (table(bench))
        div.growth {
            @for growth in &bench.growth {
                figure {
                    figcaption { b { (growth.operation) } " against " (growth.axis) ": exponent " (format!("{:.2}", growth.exponent)) }
                    (PreEscaped(curve(growth, bench.unit(growth)).to_string()))
                }
            }
        }
    };
    document(&title, &content)
}

/// All exponents.
fn table(bench: &Bench) -> Markup {
    let ends = |growth: &Growth| {
        let unit = bench.unit(growth);
        let point = |point: &(f64, f64)| format!("{:.0}: {}", point.0, amount(point.1, unit));
        [growth.points.first(), growth.points.last()].map(|end| end.map(point).unwrap_or_default())
    };
    html! {
        table.exponents {
            thead { tr {
                @for title in ["", "against", "from", "to", "exponent", "at the end", "expected", ""] { th { (title) } }
            } }
            tbody {
                @for growth in &bench.growth {
                    @let [from, to] = ends(growth);
                    @let (low, high) = growth.expected.range;
                    tr {
                        td { (growth.operation) } td { (growth.axis) } td { (from) } td { (to) }
                        td { (format!("{:.2}", growth.exponent)) } td { (format!("{:.2}", growth.last)) }
                        td { (format!("{low:.1} to {high:.1}")) } td { (growth.verdict) }
                    }
                }
            }
        }
    }
}

/// Points and the lines between them.
fn curve(growth: &Growth, unit: &str) -> SVG {
    let usable = |point: &&(f64, f64)| point.0 > 0.0 && point.1 > 0.0;
    let points: Vec<_> = growth.points.iter().filter(usable).copied().collect();
    let xs = Axis::of(points.iter().map(|point| point.0));
    let ys = Axis::of(points.iter().map(|point| point.1));
    let at = |&(x, y): &(f64, f64)| {
        (
            format!("{:.2}%", LEFT + xs.part(x) * WIDTH),
            format!("{:.1}", 10.0 + (1.0 - ys.part(y)) * (HEIGHT - EDGE - 20.0)),
        )
    };
    let label = format!("{} against {}", growth.operation, growth.axis);
    let mut svg = SVG::new()
        .set("width", "100%")
        .set("height", HEIGHT)
        .set("role", "img")
        .set("aria-label", label);
    for value in ys.ends() {
        let (_, y) = at(&(xs.low, value));
        let line = Line::new()
            .set("x1", format!("{LEFT}%"))
            .set("x2", "100%")
            .set("y1", y.as_str())
            .set("y2", y.as_str());
        let text = Text::new(amount(value, unit))
            .set("x", format!("{}%", LEFT - 1.0))
            .set("y", y)
            .set("dy", 4);
        svg = svg.add(line).add(text.set("text-anchor", "end"));
    }
    for value in xs.ends() {
        let (x, _) = at(&(value, ys.low));
        let text = Text::new(format!("{value:.0}")).set("x", x).set("y", HEIGHT - 4.0);
        svg = svg.add(text.set("text-anchor", "middle"));
    }
    for pair in points.windows(2) {
        let ((x1, y1), (x2, y2)) = (at(&pair[0]), at(&pair[1]));
        let line = Line::new().set("x1", x1).set("y1", y1).set("x2", x2).set("y2", y2);
        svg = svg.add(line.set("class", "curve"));
    }
    for point in &points {
        let (x, y) = at(point);
        let title = Title::new(format!("{:.0}: {}", point.0, amount(point.1, unit)));
        svg = svg.add(Circle::new().set("cx", x).set("cy", y).set("r", 4).add(title));
    }
    svg
}

/// A logarithmic axis.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        Self { low, high: values.fold(0.0, f64::max) }
    }

    /// Where a value is, from 0 to 1.
    fn part(&self, value: f64) -> f64 {
        if self.high > self.low {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            0.5
        }
    }

    /// What is written at it.
    fn ends(&self) -> Vec<f64> {
        match self.high {
            high if high > self.low => vec![self.low, high],
            high if high > 0.0 => vec![high],
            _ => Vec::new(),
        }
    }
}

fn amount(value: f64, unit: &str) -> String {
    match unit {
        "instr" if value >= 1e9 => format!("{:.1} Ginstr", value / 1e9),
        "instr" if value >= 1e6 => format!("{:.1} Minstr", value / 1e6),
        "instr" if value >= 1e3 => format!("{:.1} kinstr", value / 1e3),
        "ns" if value >= 1e9 => format!("{:.1} s", value / 1e9),
        "ns" if value >= 1e6 => format!("{:.1} ms", value / 1e6),
        "ns" if value >= 1e3 => format!("{:.1} us", value / 1e3),
        _ => format!("{value:.0} {unit}"),
    }
}
