// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope coverage`: which lines of type1 and of the drivers runs have run.

#![forbid(unsafe_code)]

mod functions;
mod gcov;
mod groups;
mod lines;
mod places;
mod table;

use anyhow::{Context as _, Result, ensure};
use groups::{Group, Reasons};
use lines::{Function, Lines};
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};
use table::Part;

/// Say which lines of type1 and of the drivers were run
///
/// Adds up what boots of a kernel with CONFIG=coverage have left. Prints a table of lines and branches
/// (of the drivers: basic blocks) of each function, and the lines that were not run, with the reasons
/// that --missing gives. Ends with 1 if a line has none, or a group of functions misses its goal.
#[derive(clap::Args)]
pub struct Arguments {
    /// What "gcov --json-format" says of the objects, of each boot
    #[arg(long, value_name = "FILE.json", num_args = 1.., required = true)]
    gcov: Vec<PathBuf>,

    /// What KCOV says, of each boot: lines of module, section and offset
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    places: Vec<PathBuf>,

    /// All places that there are: instructions and their basic blocks, and what addr2line says of them
    #[arg(long, value_name = "FILE")]
    sites: PathBuf,

    /// The kernel tree that it was made of
    #[arg(long, value_name = "DIRECTORY")]
    source: PathBuf,

    /// What is to be covered: lines of group, goal in percent, and path; names of functions, indented
    #[arg(long, value_name = "FILE")]
    functions: PathBuf,

    /// Why lines are missing: "= REASON", and lines of function and text, indented
    #[arg(long, value_name = "FILE")]
    missing: PathBuf,

    /// Also write it for programs, and for "dirtyscope report --coverage"
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut lines = Lines::default();
    for path in &arguments.gcov {
        gcov::add(&mut lines, &read(path)?).with_context(|| path.display().to_string())?;
    }
    let groups = groups::groups(&read(&arguments.functions)?)?;
    let below: Vec<_> =
        groups.iter().filter(|g| g.path.ends_with('/')).map(|g| g.path.clone()).collect();
    let places = places::places(&read(&arguments.sites)?, &below)?;
    let run: Vec<_> = arguments.places.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let run: HashSet<_> = run.iter().flat_map(|text| text.lines()).collect();
    ensure!(
        places.iter().any(|place| run.contains(place.block.as_str())),
        "no place of the drivers was run"
    );
    let reasons = Reasons::read(&read(&arguments.missing)?)?;

    let text_of = |file: &str| -> Vec<String> {
        let text = fs::read_to_string(arguments.source.join(file)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let of_drivers = places::functions(&places, &run, text_of);
    let functions: Vec<Vec<Function>> = groups
        .iter()
        .map(|group| {
            let others = groups.iter().filter(|other| other.path == group.path);
            let named: HashSet<_> = others.flat_map(|other| &other.functions).collect();
            functions_of(group, &named, &lines, &of_drivers, &arguments.source)
        })
        .collect::<Result<_>>()?;
    let parts: Vec<_> = groups
        .iter()
        .zip(&functions)
        .map(|(group, functions)| Part::new(group, functions, &reasons, text_of))
        .collect();

    if let Some(path) = &arguments.json {
        let all = serde_json::Value::from_iter(parts.iter().map(Part::json));
        fs::write(path, all.to_string()).with_context(|| format!("write {}", path.display()))?;
    }
    println!("  lines           branches        function");
    parts.iter().for_each(|part| print!("{}", part.text()));
    println!("not run:");
    parts.iter().for_each(|part| print!("{}", part.missing_text()));
    let missing = parts.iter().flat_map(|part| &part.missing);
    let missing: Vec<_> = missing.map(|m| (m.function.name.clone(), m.text.clone())).collect();
    for line in reasons.without(&missing) {
        println!("note: a reason that nothing needs, {line}");
    }
    let complaints: Vec<_> = parts.iter().flat_map(Part::complaints).collect();
    complaints.iter().for_each(|complaint| println!("error: {complaint}"));
    Ok(if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The functions of a group; if it names none, all but those that are `named` by others. All that are
/// named must be there.
fn functions_of(
    group: &Group,
    named: &HashSet<&String>,
    lines: &Lines,
    of_drivers: &[Function],
    source: &Path,
) -> Result<Vec<Function>> {
    let Group { path, functions: wanted, .. } = group;
    if path.ends_with('/') {
        let below = |function: &&Function| function.file.starts_with(path.as_str());
        return Ok(of_drivers.iter().filter(below).cloned().collect());
    }
    let of_file = lines.of(path);
    ensure!(!of_file.is_empty(), "gcov says nothing of {path}");
    let all = functions::functions(&read(&source.join(path))?);
    if let Some(name) = wanted.iter().find(|name| all.iter().all(|(other, _)| other != *name)) {
        anyhow::bail!("{path} has no function {name}");
    }
    let function = |(name, at): (String, _)| {
        let lines = of_file.range(at).map(|(&line, count)| (line, count.clone())).collect();
        Function { file: path.clone(), name, lines }
    };
    let all = all.into_iter().filter(|(name, _)| match wanted.is_empty() {
        true => !named.contains(name),
        false => wanted.contains(name),
    });
    // What the preprocessor leaves out has no lines.
    Ok(all.map(function).filter(|function| !function.lines.is_empty()).collect())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}
