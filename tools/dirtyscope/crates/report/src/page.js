// SPDX-License-Identifier: GPL-2.0-only
// Whoever points at a row, in a picture or beside it, sees both.
for (const chart of document.querySelectorAll(".chart")) {
	const mark = (event, on) => {
		const row = event.target.closest("[data-row]")?.dataset.row;
		if (row === undefined)
			return;
		for (const part of chart.querySelectorAll(`[data-row="${row}"]`))
			part.classList.toggle("on", on);
	};
	for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]])
		chart.addEventListener(name, (event) => mark(event, on));
}
