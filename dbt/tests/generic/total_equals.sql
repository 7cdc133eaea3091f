{#- A column's total is the total of an expression over another model, `to`: nothing was lost or counted twice. -#}
{% test total_equals(model, column_name, to, expression) %}

with

totals as (

    select
        (select sum({{ wide(column_name) }}) from {{ model }}) as actual,
        (select sum({{ wide(expression) }}) from {{ to }}) as expected

)

select *
from totals
where coalesce(actual, 0) != coalesce(expected, 0)

{% endtest %}
