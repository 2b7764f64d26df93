// A table of class "sortable" gets a button in each head and a field that filters its rows; without this script it is a plain table.
const CHINESE = document.documentElement.lang === "zh-CN";
const UNITS = { k: 1e3, K: 1e3, M: 1e6, G: 1e9, T: 1e12 };

function amount(text) { // "26.3M + 0.2M" is 26.3 million; NaN for what does not begin with a number
  const found = /^([-−+]?[\d,]*\.?\d+)\s*([kKMGT]?)/.exec(text.trim());
  return found ? Number(found[1].replace("−", "-").replaceAll(",", "")) * (UNITS[found[2]] ?? 1) : NaN;
}

function makeSortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent.trim();
  heads.forEach((head, i) => {
    const numbers = rows.some(row => text(row, i)) && rows.every(row => !text(row, i) || !Number.isNaN(amount(text(row, i))));
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const compare = (a, b) => numbers ? amount(a) - amount(b) : a.localeCompare(b, "en", { numeric: true });
      body.append(...[...rows].sort((a, b) => {
        const [x, y] = [text(a, i), text(b, i)];
        return !x || !y ? !x - !y : sign * compare(x, y); // what is empty comes last, either way
      }));
    });
  });
  const bar = document.createElement("div"), label = document.createElement("label"), field = document.createElement("input"), count = document.createElement("span");
  bar.className = "sort-filter";
  field.type = "search";
  label.append(CHINESE ? "只显示含有下列词的行 " : "Show only rows with ", field);
  count.setAttribute("role", "status");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach(row => { row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word)); });
    const shown = rows.filter(row => !row.hidden).length;
    count.textContent = CHINESE ? `${rows.length} 行中的 ${shown} 行` : `${shown} of ${rows.length}`;
  });
  bar.append(label, count);
  (table.closest(".table-wrapper") ?? table).before(bar);
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.sortable").forEach(makeSortable));

// opened as files, pages may not read each other: search then lists titles without excerpts
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
