{#- Every element of an array is one of `values`. -#}
{% test elements_accepted(model, column_name, values) %}

select element
from {{ model }}
cross join unnest({{ column_name }}) as element
where element not in ('{{ values | join("', '") }}')

{% endtest %}
