// The page is whole without this. It adds two filters, by data set and by protocol, that hide the other tables.
document.addEventListener("DOMContentLoaded", () => {
  const groups = [...document.querySelectorAll("[data-protocol]")]; // tables, and the links to them
  const tables = groups.filter((group) => group.localName === "section");
  const bar = document.createElement("p");
  const shown = document.createElement("span");
  bar.className = "filters";
  shown.setAttribute("role", "status");

  const choose = (title, name) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const value of new Set(tables.map((table) => table.dataset[name]))) select.append(new Option(value));
    select.addEventListener("change", apply);
    label.append(`${title} `, select);
    bar.append(label);
    return (group) => select.selectedIndex === 0 || select.value === group.dataset[name];
  };
  const apply = () => {
    for (const group of groups) group.hidden = !filters.every((fits) => fits(group));
    shown.textContent = `${tables.filter((table) => !table.hidden).length} of ${tables.length} shown`;
  };
  const filters = [choose("data set", "images"), choose("protocol", "protocol")];
  bar.append(shown);
  document.querySelector("nav").before(bar);
  apply();
});
